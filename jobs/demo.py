"""``lumos demo``: the whole path on a rendered corpus, with no network and no GPU."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("lumos-demo"), show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of corpus, training, sampling.")
def command(out: Path, seed: int) -> None:
    """Render a corpus of moving shapes, curate it, train from scratch, serve, generate for held-out prompts and judge.

    Needs no network and no GPU; takes about eleven minutes on two cores. Writes into OUT: report.html (videos, figures,
    loss curves, data ledger, what to try next), summary.json (the figures) and everything made on the way.

    Example: lumos demo --out /tmp/demo --seed 1
    """
    from pipelines.demo.run import demo

    summary = demo(out, seed)
    for name, value in summary["accuracy"].items():
        click.echo(f"{name:12s}{value:.3f}  (chance {summary['chance'][name]:.3f})")
    click.echo(f"{summary['seconds']['total']:.0f} s; open {out / 'report.html'}")


if __name__ == "__main__":
    run(command)
