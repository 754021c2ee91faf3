"""The verbs of ``lumos data`` that change a dataset."""

import functools
from collections.abc import Callable

import click

from pipelines.errors import UserError, storage_errors_as


def over_dataset(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the argument DATASET: a store that cannot be used, or fails, ends it in one line."""

    @functools.wraps(verb)
    def checked(dataset: str, **options: object) -> None:
        from pipelines.storage.s3 import check_store

        check_store(dataset)
        with storage_errors_as(UserError, "check its address, rights and room, then give the same command again"):
            verb(dataset, **options)

    return click.argument("dataset")(checked)


@click.command(short_help="Drop unusable stage files, restore damaged shards.")
@over_dataset
def repair(dataset: str) -> None:
    """Mend what `verify` finds: drop stage files that cannot be read, make damaged or missing shards again.

    Shards come from the stages' tables, byte for byte. Exit status 1 if something stays damaged.
    """
    from pipelines.data.upkeep.repair import repair_dataset

    done = repair_dataset(dataset)
    click.echo(done)
    click.get_current_context().exit(1 if done.beyond else 0)


@click.command(short_help="Forget failures, so that they are tried again.")
@over_dataset
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


@click.command(short_help="Delete what no snapshot needs.")
@over_dataset
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


@click.command(short_help="Free a dataset in S3 that a killed run left locked.")
@over_dataset
@click.option("--force", is_flag=True, help="Even if a run may hold it; that one stops at its next commit.")
def unlock(dataset: str, force: bool) -> None:
    """Take away the lock of a run that is dead, and tell whose it was. It would expire by itself after a minute."""
    from pipelines.storage.lock import unlock as free

    click.echo(free(dataset, force=force))
