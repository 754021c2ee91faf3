"""The part of ``lumos benchmark`` about a running service."""

import os
from pathlib import Path

import click

from jobs.benchmark_training import COUNT, JSON, write
from pipelines.errors import JobError


@click.command(short_help="A running service under many clients at once.")
@JSON
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Of the service.")
@click.option("--clients", type=COUNT, default=64, show_default=True, help="That ask at once, each again and again.")
@click.option("--duration", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Seconds.")
@click.option("--as-jobs", is_flag=True, help="Jobs that are polled, in place of direct requests.")
@click.option("--pid", type=COUNT, help="Of `lumos serve`: its memory is watched, its Ray's included.")
def load(json_path: Path | None, url: str, clients: int, duration: float, as_jobs: bool, pid: int | None) -> None:
    """Load a service, and hold each answer against what was asked.

    Prompts and seeds come again, and their videos must be the same. Exit status 1 where an answer is missing, or none
    that was asked for, or neither a video, nor a refusal with Retry-After, nor a deadline. The token is that of the
    environment, LUMOS_SERVE_TOKEN.
    """
    from pipelines.benchmarks.load import LoadConfig, run_load

    token = os.environ.get("LUMOS_SERVE_TOKEN", "").partition(",")[0] or None
    config = LoadConfig(url=url, token=token, clients=clients, duration_s=duration, jobs=as_jobs, pid=pid)
    found = run_load(config, click.echo)
    for name in ("answers", "videos", "videos_per_s", "seconds", "memory_gb", "wrong"):
        if name in found:
            click.echo(f"{name} {found[name]}")
    write(json_path, found)
    if found["wrong"]:
        raise JobError(f"{len(found['wrong'])} answers are wrong or missing")
