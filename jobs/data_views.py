"""``lumos data``: the verbs that show a dataset's clips."""

from pathlib import Path

import click

from jobs.data_upkeep import over_dataset

TOKENIZER_HELP = "File or folder of the tokenizer that made the codes, if not the embedded one."


@click.command(short_help="A page with yields, scores, thresholds and frames; or two snapshots compared.")
@over_dataset
@click.argument("other", required=False)
@click.option("--out", default="report.html", show_default=True, help="The HTML file to write.")
@click.option("--frames/--no-frames", default=True, show_default=True, help="Decode some clips' frames to show them.")
@click.option("--tokenizer", help=TOKENIZER_HELP)
def report(dataset: str, other: str | None, out: str, frames: bool, tokenizer: str | None) -> None:
    """Write a page about a snapshot: what was kept and why not, how scores lie, what others would keep, frames.

    All clips can be filtered and sorted there, and what is ticked is downloaded as a table for `overrides`. With OTHER,
    a later snapshot (its folder, or a dataset), the page tells what came and what went between the two, and why.
    """
    from pipelines.data.snapshot.read import open_snapshot
    from pipelines.data.upkeep.changes import write_changes
    from pipelines.data.upkeep.codes import snapshot_tokenizer
    from pipelines.data.upkeep.report import write_report

    snapshot = open_snapshot(dataset)
    if other is not None:
        click.echo(f"{write_changes(Path(out), snapshot, open_snapshot(other), frames=frames)}: open {out}")
        return
    write_report(Path(out), snapshot, frames=frames, tokenizer=snapshot_tokenizer(snapshot, tokenizer))
    click.echo(f"{snapshot.manifest.snapshot_id}: open {out}")


@click.command(short_help="Clips as their sources and as their codes show them.")
@over_dataset
@click.argument("clips", nargs=-1, metavar="[CLIP]...")
@click.option("--out", default="show.html", show_default=True, help="The file to write: .html, or .mp4.")
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="Clips, if none is named.")
@click.option("--tokenizer", help=TOKENIZER_HELP)
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
