"""``lumos compare``: training runs side by side."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run


@click.command(short_help="Training runs side by side: text, page, CSV, JSON.")
@click.argument("runs", nargs=-1, required=True, metavar="EXPERIMENT_OR_RUNS...")
@click.option("--tracking-uri", help="The MLflow store; else mlruns.db here, in a folder here, or beside an output.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for compare.html, runs.csv and compare.json.")
@click.option("--last", type=click.IntRange(min=1), help="Steps that final figures are means of; else a tenth, to 100.")
@click.option("--json", "as_values", is_flag=True, help="Print JSON in place of tables.")
def command(
    runs: tuple[str, ...], tracking_uri: str | None, out: Path | None, last: int | None, as_values: bool
) -> None:
    """Compare training runs: what differs in their configs, losses by step and by frame, samples, cost.

    EXPERIMENT_OR_RUNS are names of MLflow experiments, run ids, run names or output folders of `lumos train`, in any
    mixture. Runs that differ in their seed alone are one group, whose figures have a 95 % interval.
    """
    import json

    from pipelines.evaluation.compare.figures import as_json, compare_runs
    from pipelines.evaluation.compare.report import PAGE, as_text, write_report
    from pipelines.evaluation.compare.runs import RunStore
    from pipelines.training.config import ADDED

    store = RunStore(tracking_uri)
    neutral = {key: str(value) for key, value in ADDED.items()}
    comparison = compare_runs(store.find(runs), last=last, neutral=neutral)
    click.echo(json.dumps(as_json(comparison), indent=2) if as_values else as_text(comparison))
    if out is not None:
        write_report(out, comparison, store)
        click.echo(f"open {out / PAGE}", err=True)


if __name__ == "__main__":
    run(command)
