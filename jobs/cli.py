"""The ``lumos`` command. A verb's module is imported only when that verb runs, so that help is immediate."""

import difflib
import importlib
import os

import click

_VERBS = {
    "demo": "Render a small corpus, curate, train, serve, generate and judge: the whole path in minutes.",
    "curate": "Turn videos into a published snapshot of token shards.",
    "plan": "What a training run will take: memory, time, storage.",
    "train": "Train a model on a snapshot.",
    "compare": "Training runs side by side: curves, final figures, cost, samples.",
    "export": "Make a model folder of a training's checkpoint.",
    "generate": "Generate videos: one prompt, or a file of them.",
    "serve": "Serve a model over HTTP until interrupted.",
    "evaluate": "Measure generated videos, show them in a gallery, read official benchmarks' results.",
    "submit": "Run a verb as a job of a Ray cluster, and follow it.",
    "jobs": "The jobs of a Ray cluster: list, logs, stop.",
    "data": "Look after a dataset: plan, status, report, show, export, verify, repair, retry, remove, unlock, gc.",
    "tokenizer": "Train a tokenizer, or evaluate a video tokenizer.",
    "benchmark": "Measure parts of the pipeline against the least they could cost.",
}


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports ``jobs.VERB`` when one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of the work."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, or None."""
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"jobs.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown verb suggests one that is written alike."""
        close = difflib.get_close_matches(args[0], _VERBS, n=1) if args[0] not in _VERBS else []
        if close:
            ctx.fail(f"No such command {args[0]!r}; did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(cls=LazyGroup)
@click.version_option(package_name="lumos-ray", prog_name="lumos")
def group() -> None:
    """Lumos-1 video generation on Ray: raw video to token shards to a trained, served model.

    Start with `lumos demo`. `lumos VERB --help` explains a verb. CONFIG is a YAML file or the name of a shipped one;
    KEY=VALUE after it changes a key, e.g. `lumos train demo optimizer.lr=1e-4`.

    `lumos submit VERB ...` runs a verb as a job of a Ray cluster. Without it, a verb runs here, on a cluster that is
    started for the command, or on the one that RAY_ADDRESS names.

    Exit status: 0 done; 1 failed; 2 bad usage or configuration, nothing begun.
    """
    if os.environ.get("LUMOS_EXPECTED"):
        from pipelines.config import check_expected

        check_expected()


def main() -> None:
    """Entry point of the ``lumos`` script."""
    from jobs.command import run

    run(group)


if __name__ == "__main__":
    main()
