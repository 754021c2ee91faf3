"""``lumos train``: a snapshot of token shards to a trained model."""

import sys
from pathlib import Path

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import ConfigCommand, config_arguments, resolve, run


@click.command(
    cls=ConfigCommand,
    kind="train",
    examples=(
        "lumos train quickstart data.dataset=runs/dataset",
        "lumos train quickstart data.dataset=runs/dataset output=runs/mine steps=500 optimizer.lr=5e-4",
        "lumos train quickstart data.dataset=runs/dataset --dry-run",
    ),
)
@config_arguments()
@click.option(
    "--dry-run", "dry", is_flag=True, help="Make one step of each bucket, say what memory it took, keep nothing."
)
def command(config: str, overrides: tuple[str, ...], print_config: bool, dry: bool) -> None:
    """Train a model on a snapshot of token shards.

    Runs DeepSpeed on Ray Train workers. Writes checkpoints and, at the end, an export folder (safetensors, config.json,
    text_tokenizer.json) that `lumos generate` and `lumos serve` read. The same command again continues from the last
    checkpoint and ends with the same curve. SIGTERM (kill PID) saves a checkpoint before it ends; Ctrl-C ends at once,
    and the steps since the last checkpoint are computed once more.

    The run is tracked in MLflow, with the other runs of the folder that holds its output (in mlruns.db there), unless
    tracking.uri names a server.
    """
    from pipelines.training.config import TrainConfig

    resolved = resolve(TrainConfig, config, overrides, print_config)
    if dry:
        from pipelines.training.dry_run import dry_run

        click.echo("\n".join(dry_run(resolved)))
        return

    from pipelines.training.run import train

    result = train(resolved)  # it joins Ray itself, once config, data and output are found good
    metrics = result.metrics
    click.echo(
        f"{result.steps} steps: loss {metrics['loss_first']:.3f} to {metrics['loss_last']:.3f}, "
        f"{metrics['tokens_per_s']:.0f} tokens/s"
    )
    run = (
        f"MLflow run {result.run_id}" if result.run_id else "MLflow has not been reached; the same command sends it all"
    )
    click.echo(f"{run}: {result.store.how_to_open}")
    click.echo(f"model {result.export}")


if __name__ == "__main__":
    run(command)
