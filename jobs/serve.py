"""``lumos serve``: models behind HTTP until interrupted."""

import json
import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.command(
    cls=ConfigCommand,
    kind="serve",
    examples=(
        "lumos serve --model runs/quickstart/export --port 8000",
        "lumos serve default model=runs/quickstart/export models.small=runs/small/export jobs=s3://bucket/jobs",
    ),
)
@config_arguments(required=False)
@click.option("--model", help="Folder that `lumos train` exported, or of a released checkpoint; the key model.")
@click.option("--port", type=click.IntRange(1, 65535), help="The key port.")
@click.option("--host", help="Address to listen at; the key host.")
@click.option("--jobs", help="Folder or s3:// prefix that keeps jobs and their videos; the key jobs.")
def command(config: str | None, overrides: tuple[str, ...], print_config: bool, **options: Any) -> None:
    """Serve models over HTTP until interrupted (Ctrl-C).

    Loads export folders into Ray Serve and answers as OpenAI's video API does: POST /v1/videos makes a job, which
    outlives the service; POST /v1/videos/sync answers with the file. Documentation is at /docs. Listens on this machine
    alone unless the config says otherwise; any other address needs a bearer token. SIGHUP reads the models' folders
    anew and replaces the replicas; no job is lost.

    Without CONFIG the config `default` is used, which asks for --model.
    """
    if not print_config:
        click.echo("loading")  # what is imported next takes seconds
    from pipelines.generation.config import ServeConfig

    if config is None or ("=" in config and not Path(config).exists()):
        overrides = (*filter(None, [config]), *overrides)
        config = "default"
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]
    resolved = resolve(ServeConfig, config, [*overrides, *given], print_config)

    from pipelines.generation.serving.run import serve

    serve(resolved)  # it joins Ray itself, once model, port and token are found good


if __name__ == "__main__":
    run(command)
