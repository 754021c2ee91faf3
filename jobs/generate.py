"""``lumos generate``: videos for one prompt, or for a file of them."""

import json
import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run

_KEYS = {"frames": "video.num_frames", "steps": "sampling.num_steps", "guidance": "sampling.guidance_scale"}
_COUNT = click.IntRange(min=1)


@click.command(
    cls=ConfigCommand,
    kind="generate",
    examples=(
        'lumos generate --model runs/quickstart/export --prompt "a red square moves left" --seed 7',
        'lumos generate --model M --prompt "it turns to the left" --image photo.jpg --out video.mp4',
        "lumos generate --model runs/quickstart/export prompts=prompts.csv seeds_per_prompt=4",
        "lumos generate default model=M layout=vbench prompts=VBench_full_info.json output=vbench",
    ),
)
@config_arguments(required=False)
@click.option("--model", help="Folder that `lumos train` exported, or of a released checkpoint; the key model.")
@click.option("--prompt", "prompts", multiple=True, help="Text of a video, repeatable; the key prompts.")
@click.option("--image", metavar="FILE", help="Picture that the video begins with; the key image.")
@click.option("--continue", "clip", metavar="FILE", help="Video whose end is continued; the key clip.")
@click.option("--out", "output", help="Folder for the videos, or one file (.mp4, .gif, .png); the key output.")
@click.option("--size", metavar="WxH", help="Width and height, px, e.g. 448x256; the keys video.width, video.height.")
@click.option("--frames", type=_COUNT, help="1 + 4k frames, given ones included; 1 is an image (.png).")
@click.option("--steps", type=_COUNT, help="Sampling steps per latent frame; the key sampling.num_steps.")
@click.option("--guidance", type=click.FloatRange(min=0), help="1 is none; the key sampling.guidance_scale.")
@click.option("--seed", type=click.IntRange(min=0), help="First sampling seed; the key seed.")
def command(
    config: str | None, overrides: tuple[str, ...], print_config: bool, size: str | None, **options: Any
) -> None:
    """Generate videos for one prompt, or for a file of them.

    Writes one file per prompt and seed, beside a manifest that says of each how it was made. A run that was stopped
    continues: what the manifest holds is not made again. As few videos as fit a batch (8) are drawn in this process;
    more of them, or those of several replicas, by Ray Serve for the time of the run. Pictures and videos that are
    given are cut to the video's shape at their centre; the output holds the frames given and the new ones.

    Without CONFIG the config `default` is used, which asks for --model and --prompt.
    """
    if not print_config:
        click.echo("reading the request", err=True)  # what is imported next takes seconds
    from lumos.compression import num_latent_frames, parse_size
    from pipelines.errors import UserError
    from pipelines.generation.config import GenerateConfig
    from pipelines.media import MEDIA_TYPES

    if config is None or ("=" in config and not Path(config).exists()):
        overrides = (*filter(None, [config]), *overrides)
        config = "default"
    if config.endswith((".txt", ".csv", ".jsonl", ".parquet")):
        raise UserError(f"config {config} is no YAML: if it is a file of prompts, write prompts={config}")
    suffix = (options["output"] or "").rpartition(".")[2].lower()
    implied = suffix if suffix in MEDIA_TYPES else "png" if options["frames"] == 1 else None
    if not any(override.startswith("format=") for override in overrides):
        options["format"] = implied
    try:
        if size is not None:
            options["video.width"], options["video.height"] = parse_size(size)
        if options["frames"] is not None:
            num_latent_frames(options["frames"])
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('num_')}") from error
    given = [
        f"{_KEYS.get(key, key)}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value not in (None, ())
    ]
    resolved = resolve(GenerateConfig, config, [*overrides, *given], print_config)

    from pipelines.generation.bulk.run import generate

    # It joins Ray itself, where that is needed, once model, prompts and output are found good.
    click.echo(generate(resolved, lambda words: click.echo(words, err=True)))


if __name__ == "__main__":
    run(command)
