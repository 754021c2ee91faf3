"""``lumos data``: look after datasets that ``lumos curate`` made."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import config_arguments, curate_arguments, resolve, run
from jobs.data_export import export
from jobs.data_removals import remove, restore
from jobs.data_upkeep import gc, over_dataset, repair, retry, unlock
from jobs.data_views import report, show
from pipelines.cores import usable_cores


@click.group()
def command() -> None:
    """Look after a dataset: what it holds, whether it is whole, what to try again or delete.

    DATASET is the folder or s3:// prefix that `lumos curate` wrote to; `verify` and `report` also take the folder of
    one snapshot, and otherwise look at the newest.
    """


@command.command(short_help="What a dataset holds and what failed.")
@over_dataset
def status(dataset: str) -> None:
    """Show the snapshots, what became of clips and sources, and each stage's rows and failures."""
    from pipelines.data.upkeep.status import dataset_status

    click.echo(dataset_status(dataset))


@command.command(short_help="Check a snapshot's files, counts and codes.")
@over_dataset
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Clips decoded from their source and compared; 0: none.",
)
@click.option("--tokenizer", help="File or folder of the tokenizer that made it, if not the embedded one.")
def verify(dataset: str, sample: int, tokenizer: str | None) -> None:
    """Read a snapshot whole: hashes, counts, codes, ledger against shards. Exit status 1 if anything is wrong."""
    from pipelines.data.snapshot.read import open_snapshot
    from pipelines.data.upkeep.verify import recheck, verify_snapshot

    snapshot = open_snapshot(dataset)
    found = verify_snapshot(snapshot)
    click.echo(f"{snapshot.uri}\n{found}")
    bad = bool(found.problems)
    if sample and not bad:
        again = recheck(snapshot, sample, tokenizer)
        click.echo(again)
        bad = bool(again.problems)
    sys.exit(1 if bad else 0)


@command.command(short_help="Expected yield, time, disk, memory and cost, from a sample.")
@config_arguments()
@click.option("--sources", default=8, show_default=True, help="Curated in a scratch folder to tell.")
@click.option("--cpus", type=float, default=usable_cores, show_default="this machine's", help="Of the cluster.")
@click.option("--gpus", type=float, default=0.0, show_default=True, help="Of the cluster.")
@click.option("--price", type=float, default=0.0, help="Of an hour of the cluster, in any currency.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
def plan(config: str, overrides: tuple[str, ...], print_config: bool, **options: float) -> None:
    """Curate a few sources of a run in a scratch folder and tell what all of it will yield and take.

    CONFIG is that of `lumos curate`; the sample is drawn over all file sizes.
    """
    from pipelines.data.config import CurateConfig
    from pipelines.data.upkeep.estimate import Cluster, plan_curation

    cluster = Cluster(cpus=options["cpus"], gpus=options["gpus"], price=options["price"])
    resolved = resolve(CurateConfig, *curate_arguments(config, overrides), print_config)
    click.echo(plan_curation(resolved, cluster, sources=int(options["sources"]), seed=int(options["seed"])))


for verb in (report, show, export, repair, retry, remove, restore, unlock, gc):
    command.add_command(verb)

if __name__ == "__main__":
    run(command)
