"""``lumos curate``: videos to a published snapshot of token shards."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, curate_arguments, resolve, run


@click.command(
    cls=ConfigCommand,
    kind="curate",
    examples=(
        "lumos curate /data/videos",
        "lumos curate '/data/videos/*/*.mp4' dataset=/data/tokens",
        "lumos curate default source.path=/data/videos dataset=/data/tokens",
    ),
)
@config_arguments()
def command(config: str, overrides: tuple[str, ...], print_config: bool) -> None:
    """Turn videos into a published snapshot of token shards.

    Probes and splits every video, scores the clips, decides which to keep, captions and tokenizes those, and publishes
    an immutable snapshot: Parquet shards, a manifest and a ledger that says of every clip and source what became of
    it and why. A run that was stopped continues where it was; a changed config redoes only the stages it concerns.

    CONFIG may also be a source: a folder of videos, a quoted glob, a video, or a table of paths (CSV, JSONL, Parquet),
    here or at an s3:// address. That is the default config with that source.
    """
    from pipelines.data.config import CurateConfig

    resolved = resolve(CurateConfig, *curate_arguments(config, overrides), print_config)
    resolved.source.check_exists()  # at once: what is imported below takes seconds

    def tell(words: str) -> None:
        if resolved.progress:
            click.echo(words, err=True)

    tell(f"curating {resolved.source.path} into {resolved.dataset}")

    from pipelines.data.curate import CONTINUE, curate
    from pipelines.errors import JobError

    try:
        result = curate(resolved, tell)  # it joins Ray itself, once sources, captions and tokenizer are found good
    except KeyboardInterrupt as interrupt:
        raise JobError(f"stopped; {CONTINUE}") from interrupt
    click.echo(result.summary())


if __name__ == "__main__":
    run(command)
