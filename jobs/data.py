"""``lumos data``: look after datasets that ``lumos curate`` made."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run

dataset_argument = click.argument("dataset")


@click.group()
def command() -> None:
    """Look after a dataset: what it holds, whether it is whole, what to try again or delete.

    DATASET is the folder or s3:// prefix that `lumos curate` wrote to; `verify` and `report` also take the folder of
    one snapshot, and otherwise look at the newest.
    """


@command.command(short_help="What a dataset holds and what failed.")
@dataset_argument
def status(dataset: str) -> None:
    """Show the snapshots, what became of clips and sources, and each stage's rows and failures."""
    from pipelines.data.upkeep import dataset_status

    click.echo(dataset_status(dataset))


@command.command(short_help="A page with yields, score histograms and other thresholds.")
@dataset_argument
@click.option("--out", default="report.html", show_default=True, help="The HTML file to write.")
def report(dataset: str, out: str) -> None:
    """Write a page about a snapshot: what was kept and why not, how scores lie, what another threshold would keep."""
    from pipelines.data.report import write_report
    from pipelines.data.snapshot import open_snapshot

    snapshot = open_snapshot(dataset)
    write_report(Path(out), snapshot)
    click.echo(f"{snapshot.manifest.snapshot_id}: open {out}")


@command.command(short_help="Check a snapshot's files, counts and codes.")
@dataset_argument
def verify(dataset: str) -> None:
    """Read a snapshot whole: hashes, counts, codes, ledger against shards. Exit status 1 if anything is wrong."""
    from pipelines.data.snapshot import open_snapshot
    from pipelines.data.verify import verify_snapshot

    snapshot = open_snapshot(dataset)
    found = verify_snapshot(snapshot)
    click.echo(f"{snapshot.uri}\n{found}")
    sys.exit(1 if found.problems else 0)


@command.command(short_help="Forget failures, so that they are tried again.")
@dataset_argument
@click.option("--class", "failure_class", default="transient", show_default=True, help="Or permanent, or a code.")
def retry(dataset: str, failure_class: str) -> None:
    """Forget failures of a class that `status` shows. The next `lumos curate` tries just their inputs again."""
    from pipelines.data.upkeep import retry as forget

    forgotten = forget(dataset, failure_class)
    for stage, count in forgotten.items():
        click.echo(f"{stage}: {count} failures forgotten")
    click.echo("give the same `lumos curate` again to retry them" if forgotten else f"no failure is {failure_class}")


@command.command(short_help="Take sources out of all later snapshots.")
@dataset_argument
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
def remove(dataset: str, sources: tuple[str, ...]) -> None:
    """Take sources (paths as the ledger has them, or source_ids) out of all snapshots to come, under any name."""
    from pipelines.data.removal import remove_sources

    for source_id in remove_sources(dataset, list(sources)):
        click.echo(f"removed {source_id}")
    click.echo("the next `lumos curate` publishes a snapshot without it; published ones stay as they are")


@command.command(short_help="Delete what no snapshot needs.")
@dataset_argument
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def gc(dataset: str, dry_run: bool) -> None:
    """Delete stage tables of configurations that no snapshot was made from, and unfinished snapshots."""
    from pipelines.data.upkeep import collect_garbage

    paths = collect_garbage(dataset, dry_run=dry_run)
    for path in paths or ["nothing"]:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {path}")


if __name__ == "__main__":
    run(command)
