"""``lumos benchmark``: measure parts of the pipeline against the least they could cost."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.benchmark_generate import generate, sampling
from jobs.benchmark_layout import check
from jobs.benchmark_pictures import cuts, duplicates, patterns
from jobs.benchmark_serving import load
from jobs.benchmark_training import COUNT, JSON, attention, loss, train, write
from jobs.command import run


@click.group()
def command() -> None:
    """Measure parts of the pipeline on this machine. Ratios compare times taken in turns; medians count."""


@command.command(short_help="Score pass and tokenizing against their floors; what a row costs.")
@JSON
@click.option("--repeats", type=COUNT, default=5, show_default=True, help="Times of each figure.")
@click.option("--copies", type=COUNT, default=8, show_default=True, help="Of the film (9 s at 1280x720) worked on.")
@click.option("--null-rows", type=COUNT, default=1_000_000, show_default=True, help="Through a stage without work.")
@click.option("--clips", type=COUNT, default=200_000, show_default=True, help="Of a curation that decodes nothing.")
def data(json_path: Path | None, repeats: int, copies: int, null_rows: int, clips: int) -> None:
    """Measure the data pipeline.

    seconds, driver_growth_mb, worker_peak_mb: of a whole curation of so many clips, whose scores and codes are made up;
    by how much the driver grows, and what the largest worker holds.
    score_pass_vs_floor: speed of the pass that splits and scores, over that of the same processes only decoding the
    same frames at the same small size. tokenize_vs_floor: speed of the token stage over that of decoding and encoder
    calls alone. null_row_ms: what a row costs in a stage that does nothing, anti-join and commit included.
    null_driver_growth_mb: memory that the driver takes for a manifest of so many rows.
    """
    from pipelines.benchmarks.data import DataBenchmarkConfig, run_data_benchmark

    config = DataBenchmarkConfig(repeats=repeats, copies=copies, null_rows=null_rows, clips=clips)
    found = run_data_benchmark(config, click.echo)
    for name, value in found.items():
        if isinstance(value, int | float) and name != "schema":
            click.echo(f"{name} {value}")
    write(json_path, found)


for each in (train, attention, loss, generate, sampling, load, check, cuts, patterns, duplicates):
    command.add_command(each)


if __name__ == "__main__":
    run(command)
