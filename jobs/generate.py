"""``lumos generate``: videos for one prompt, or for a file of them."""

import json
import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.command(
    cls=ConfigCommand,
    kind="generate",
    examples=(
        'lumos generate --model runs/quickstart/export --prompt "a red square moves left" --seed 7',
        "lumos generate prompts.yaml model=runs/quickstart/export seeds_per_prompt=4",
    ),
)
@config_arguments(required=False)
@click.option("--model", help="Folder that `lumos train` exported, or of a released checkpoint; the key model.")
@click.option("--prompt", "prompts", multiple=True, help="Text of a video, repeatable; the key prompts.")
@click.option("--out", "output", help="Folder for the videos, or one file (.mp4); the key output.")
@click.option("--seed", type=click.IntRange(min=0), help="First sampling seed; the key seed.")
def command(
    config: str | None, overrides: tuple[str, ...], print_config: bool, **options: str | int | tuple[str, ...] | None
) -> None:
    """Generate videos for one prompt, or for a file of them.

    Serves the model with Ray Serve for the time of the run and writes one file per prompt and seed, beside a manifest
    that says of each how it was made. A run that was stopped continues: what the manifest holds is not made again.

    Without CONFIG the config `default` is used, which asks for --model and --prompt.
    """
    from pipelines.generation.config import GenerateConfig

    if config is None or ("=" in config and not Path(config).exists()):
        overrides = (*filter(None, [config]), *overrides)
        config = "default"
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value not in (None, ())
    ]
    resolved = resolve(GenerateConfig, config, [*overrides, *given], print_config)

    from pipelines.generation.bulk.run import generate

    click.echo(generate(resolved))  # it joins Ray itself, once model, prompts and output are found good


if __name__ == "__main__":
    run(command)
