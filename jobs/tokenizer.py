"""``lumos tokenizer``: train the video tokenizer, or measure one."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.group()
def command() -> None:
    """Train a tokenizer (video or text), or evaluate a video tokenizer."""


@command.command(
    cls=ConfigCommand,
    kind="tokenizer",
    short_help="Train a tokenizer of video or text.",
    examples=("lumos tokenizer train fsq output=runs/fsq.safetensors fsq.source.videos=path/to/videos",),
)
@config_arguments()
def train(config: str, overrides: tuple[str, ...], print_config: bool) -> None:
    """Train a tokenizer: of video on a folder of videos and procedural clips, or of text on a list of captions.

    Writes one file, which later configs name. The configs that made the embedded ones are shipped. An interrupted run
    continues where it was.
    """
    from pipelines.training.tokenizer.train import TokenizerTrainConfig, train_tokenizer

    click.echo(train_tokenizer(resolve(TokenizerTrainConfig, config, overrides, print_config)))


@command.command(
    cls=ConfigCommand,
    kind="tokenizer-evaluation",
    short_help="Measure a video tokenizer.",
    examples=("lumos tokenizer evaluate corpus", "lumos tokenizer evaluate corpus videos=path/to/videos width=224"),
)
@config_arguments()
def evaluate(config: str, overrides: tuple[str, ...], print_config: bool) -> None:
    """Encode and decode videos with a tokenizer; prints PSNR and the codes in use, per video and over all."""
    from pipelines.training.tokenizer.evaluate import TokenizerEvaluateConfig, evaluate_tokenizer

    click.echo(evaluate_tokenizer(resolve(TokenizerEvaluateConfig, config, overrides, print_config)))


if __name__ == "__main__":
    run(command)
