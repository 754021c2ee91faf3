"""The verbs of ``lumos data`` that change a dataset."""

import click

dataset_argument = click.argument("dataset")


@click.command(short_help="Drop unusable stage files, restore damaged shards.")
@dataset_argument
def repair(dataset: str) -> None:
    """Mend what `verify` finds: drop stage files that cannot be read, make damaged or missing shards again.

    Shards come from the stages' tables, byte for byte. Exit status 1 if something stays damaged.
    """
    from pipelines.data.upkeep.repair import repair_dataset

    done = repair_dataset(dataset)
    click.echo(done)
    click.get_current_context().exit(1 if done.beyond else 0)


@click.command(short_help="Forget failures, so that they are tried again.")
@dataset_argument
@click.option(
    "--class",
    "failure_class",
    default="transient",
    show_default=True,
    help="Or permanent, or a code such as decode_error.",
)
def retry(dataset: str, failure_class: str) -> None:
    """Forget failures of a class that `status` shows. The next `lumos curate` tries just their inputs again."""
    from pipelines.data.upkeep.status import retry as forget

    forgotten = forget(dataset, failure_class)
    for stage, count in forgotten.items():
        click.echo(f"{stage}: {count} failures forgotten")
    click.echo("give the same `lumos curate` again to retry them" if forgotten else f"no failure is {failure_class}")


@click.command(short_help="Take sources out of all later snapshots.")
@dataset_argument
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
def remove(dataset: str, sources: tuple[str, ...]) -> None:
    """Take sources (paths as the ledger has them, or source_ids) out of all snapshots to come, under any name."""
    from pipelines.data.snapshot.removals import remove_sources

    for source_id in remove_sources(dataset, list(sources)):
        click.echo(f"removed {source_id}")
    click.echo("the next `lumos curate` publishes a snapshot without it; published ones stay until `gc --keep`")


@click.command(short_help="Delete what no snapshot needs.")
@dataset_argument
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--keep", type=click.IntRange(min=1), help="Snapshots that stay, the newest ones.  [default: all]")
def gc(dataset: str, dry_run: bool, keep: int | None) -> None:
    """Delete stage tables of configurations that no snapshot was made from, and unfinished snapshots.

    Rows of removed sources go too, codes and captions among them, once no snapshot holds them: after a takedown, give
    `lumos data remove`, `lumos curate`, and `lumos data gc --keep 1`.
    """
    from pipelines.data.upkeep.status import collect_garbage

    paths = collect_garbage(dataset, dry_run=dry_run, keep=keep)
    for path in paths or ["nothing"]:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {path}")
