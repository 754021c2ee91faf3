"""``lumos plan``: what a training run will take, before it starts."""

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.command(
    cls=ConfigCommand,
    kind="train",
    short_help="What a training run will take: memory, time, storage.",
    examples=(
        "lumos plan 1b-joint-256p --cluster 48xH20 --tokens 100e9 --rows image:32x56 --rows video:7x32x56",
        "lumos plan quickstart data.dataset=runs/dataset --cluster 1xL40S",
    ),
)
@config_arguments()
@click.option("--cluster", required=True, help="Devices, such as 48xH20 or 8xH100-80GB.")
@click.option("--tflops", type=float, help="Of a device that is not known, dense; --cluster is a number.")
@click.option("--memory-gb", type=float, help="Of a device that is not known.")
@click.option(
    "--rows",
    multiple=True,
    help="Latent shapes, such as image:32x56, video:7x32x56=10e6 (how many there are); else the dataset's.",
)
@click.option("--tokens", type=float, help="Budget, such as 100e9; else the steps of the config.")
@click.option("--mfu", type=float, default=0.4, show_default=True, help="Share of the peak that is reached.")
@click.option("--caption-tokens", type=click.IntRange(min=0), default=200, show_default=True, help="Of a prompt.")
@click.option("--devices-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(config: str, overrides: tuple[str, ...], print_config: bool, as_json: bool, **options: Any) -> None:
    """Tell FLOPs, memory, time and storage of a training run, without starting it.

    By the formulas that give MFU. Exit status 1 if it does not fit; then the keys that would help are named.
    """
    import json

    from pipelines.training.config import TrainConfig

    resolved = resolve(TrainConfig, config, overrides, print_config)

    from pipelines.training.accelerators import parse_cluster
    from pipelines.training.estimate import make_plan
    from pipelines.training.estimate_text import as_text, as_values
    from pipelines.training.plan_question import make_question

    cluster = parse_cluster(options.pop("cluster"), options.pop("tflops"), options.pop("memory_gb"))
    plan = make_plan(resolved, make_question(resolved, cluster, **options))
    click.echo(json.dumps(as_values(plan), indent=2) if as_json else as_text(plan))
    sys.exit(0 if plan.fits else 1)


if __name__ == "__main__":
    run(command)
