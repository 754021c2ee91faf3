"""``lumos data``: the verbs that show a dataset's clips, or write them as files."""

from pathlib import Path
from typing import Any

import click

from jobs.data_upkeep import over_dataset

_TOKENIZER_HELP = "File or folder of the tokenizer that made the codes, if not the embedded one."


@click.command(short_help="A page with yields, scores, other thresholds and frames.")
@over_dataset
@click.option("--out", default="report.html", show_default=True, help="The HTML file to write.")
@click.option("--frames/--no-frames", default=True, show_default=True, help="Decode some clips' frames to show them.")
def report(dataset: str, out: str, frames: bool) -> None:
    """Write a page about a snapshot: what was kept and why not, how scores lie, what others would keep, frames."""
    from pipelines.data.snapshot.read import open_snapshot
    from pipelines.data.upkeep.report import write_report

    snapshot = open_snapshot(dataset)
    write_report(Path(out), snapshot, frames=frames)
    click.echo(f"{snapshot.manifest.snapshot_id}: open {out}")


@click.command(short_help="Clips as their sources and as their codes show them.")
@over_dataset
@click.argument("clips", nargs=-1, metavar="[CLIP]...")
@click.option("--out", default="show.html", show_default=True, help="The file to write: .html, or .mp4.")
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="Clips, if none is named.")
@click.option("--tokenizer", help=_TOKENIZER_HELP)
def show(dataset: str, clips: tuple[str, ...], out: str, count: int, tokenizer: str | None) -> None:
    """Decode the codes of kept clips, and show them beside the frames that were encoded, with the PSNR of each.

    CLIP is the key of a kept clip, how it begins, or the path of a source as the ledger has it. Exit status 1 if codes
    are outside the codebook.
    """
    from pipelines.data.snapshot.read import open_snapshot
    from pipelines.data.upkeep.show import SUFFIXES, choose_keys, need_tokenizer, show_clips, write_shown
    from pipelines.errors import UserError
    from pipelines.pages.render import check_writable

    if Path(out).suffix not in SUFFIXES:
        raise UserError(f"--out {out} is neither a page nor a video: name a file that ends in {' or '.join(SUFFIXES)}")
    snapshot = open_snapshot(dataset)
    keys, loaded = choose_keys(snapshot, clips, count), need_tokenizer(snapshot, tokenizer)
    check_writable(Path(out))
    shown = show_clips(snapshot, keys, loaded)
    write_shown(Path(out), snapshot, shown)
    for clip in shown:
        told = clip.source if isinstance(clip.source, str) else f"{clip.psnr:.1f} dB"
        click.echo(f"{told}  {clip.row['path']} {clip.row['key']}")
        if clip.problem:
            click.echo(f"{clip.row['key']}: {clip.problem}", err=True)
    click.echo(f"{snapshot.manifest.snapshot_id}: open {out}")
    click.get_current_context().exit(1 if any(clip.outside for clip in shown) else 0)


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
@click.option("--tokenizer", help=_TOKENIZER_HELP)
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
