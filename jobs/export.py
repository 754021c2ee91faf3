"""``lumos export``: a model folder out of any kept checkpoint of a training run."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run


@click.command(epilog="Example: lumos export runs/mine@4000 models/mine --dtype bf16")
@click.argument("checkpoint")
@click.argument("out", required=False)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the weights.")
@click.option("--ema", is_flag=True, help="The moving average of the weights, where the run keeps one.")
def command(checkpoint: str, out: str | None, dtype: str, ema: bool) -> None:
    """Make a model folder of a CHECKPOINT: its folder, or RUN@STEP; local or s3://.

    RUN is the output folder of `lumos train`, or the folder that holds its checkpoints. Without @STEP, the newest one.
    OUT is the folder to write, local or s3://; export-STEP where none is named. `lumos generate` and `lumos serve` read
    it. No training is started, and no more than one file of weights is in memory.
    """
    from pipelines.errors import UserError, storage_errors_as
    from pipelines.training.export import export_to, locate

    stored = locate(checkpoint)
    target = out or f"export-{stored.state.step}"
    with storage_errors_as(UserError, "no model was made"):
        export_to(stored, target, dtype="bf16" if dtype == "bf16" else "fp32", ema=ema)
    click.echo(f"model of step {stored.state.step}: {target}")


if __name__ == "__main__":
    run(command)
