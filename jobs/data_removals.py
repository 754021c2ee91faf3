"""``lumos data``: the verbs that take sources out of a dataset, and into it again."""

import click

from jobs.data_upkeep import over_dataset


@click.command(short_help="Take sources out of all later snapshots.")
@over_dataset
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
def remove(dataset: str, sources: tuple[str, ...]) -> None:
    """Take sources (paths as the ledger has them, or source_ids) out of all snapshots to come, under any name."""
    from pipelines.data.upkeep.removals import remove_sources

    for source_id in remove_sources(dataset, list(sources)):
        click.echo(f"removed {source_id}")
    click.echo("the next `lumos curate` publishes a snapshot without it; published ones stay until `gc --keep`")


@click.command(short_help="Take removed sources into later snapshots again.")
@over_dataset
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
def restore(dataset: str, sources: tuple[str, ...]) -> None:
    """Undo `remove`: take sources (paths as a ledger has them, or source_ids) into the snapshots to come again."""
    from pipelines.data.upkeep.removals import restore_sources

    for source_id in restore_sources(dataset, list(sources)):
        click.echo(f"restored {source_id}")
    click.echo("the next `lumos curate` publishes a snapshot with it, if it is among the sources")
