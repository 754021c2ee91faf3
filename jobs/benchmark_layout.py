"""The part of ``lumos benchmark`` about folders of generated videos. Ray is not needed."""

import click

from pipelines.benchmark_names import BENCHMARK_NAMES
from pipelines.errors import JobError


@click.command(short_help="Whether a folder of videos has the layout that a benchmark's code reads.")
@click.argument("folder", metavar="DIR")
@click.option("--layout", type=click.Choice(BENCHMARK_NAMES), required=True)
@click.option("--prompts", metavar="FILE", help="The benchmark's file; default: the one that DIR/generate.json names.")
def check(folder: str, layout: str, prompts: str | None) -> None:
    """Say what is missing, surplus or wrong in DIR, which `lumos generate` made with the key layout.

    The names are those that VBench, VBench-2.0 and GenEval look for. Exit status 1 if anything is amiss.
    """
    from pipelines.generation.bulk.check import check_layout

    report = check_layout(folder, layout, prompts)
    if not report.is_valid:
        raise JobError(f"{folder} is not complete. {report}")
    click.echo(report)


if __name__ == "__main__":
    from jobs.command import run

    run(check)
