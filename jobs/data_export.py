"""``lumos data export``: kept clips as files for other programs."""

from typing import Any

import click

from jobs.data_upkeep import over_dataset
from jobs.data_views import TOKENIZER_HELP


@click.command(short_help="Kept clips as video files with captions and scores.")
@over_dataset
@click.argument("out")
@click.option("--clips", type=click.Choice(["mp4", "gif"]), default="mp4", show_default=True, help="Kind of videos.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["files", "webdataset"]),
    default="files",
    show_default=True,
    help="Three files a clip, or tar files of many.",
)
@click.option(
    "--frames",
    type=click.Choice(["source", "codes"]),
    default="source",
    show_default=True,
    help="What videos show: the frames that were encoded, or what the codes make of them, which takes no sources.",
)
@click.option("--shard-clips", type=click.IntRange(min=1), default=256, show_default=True, help="Clips in a tar file.")
@click.option("--tokenizer", help=TOKENIZER_HELP)
def export(dataset: str, out: str, tokenizer: str | None, **options: Any) -> None:
    """Write the kept clips of the newest snapshot to OUT, a folder or an s3:// prefix.

    Of each clip a video, its captions (.txt, one a line) and the rest (.json: path, span, split, captions, scores);
    clips.jsonl, written last, lists all. A command that was stopped goes on when it is given again.
    """
    from pipelines.data.snapshot.read import open_snapshot
    from pipelines.data.upkeep.export import Export, export_clips
    from pipelines.data.upkeep.show import need_tokenizer
    from pipelines.storage.s3 import check_store

    check_store(out)
    snapshot, chosen = open_snapshot(dataset), Export(**options)
    loaded = need_tokenizer(snapshot, tokenizer) if chosen.frames == "codes" else None
    click.echo(f"{out}: {export_clips(snapshot, out, chosen, loaded)}")
