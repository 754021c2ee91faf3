"""``lumos evaluate``: metrics of generated videos, a gallery of them, and the results of official benchmarks."""

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":  # run as a script: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.command import run
from pipelines.benchmark_names import ACCEPTED_NAMES

_FORMS = ("auto", "page", "folder", "none")  # auto: videos within the page up to --page-mb, else beside it


class _FoldersOrVerb(click.Group):
    """A group whose arguments are folders unless they begin with the name of a verb."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb that takes folders in front where none stands there."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["folders", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_FoldersOrVerb, subcommand_metavar="DIR... | import FILES...", no_args_is_help=True)
def command() -> None:
    """Measure generated videos: `lumos evaluate DIR`, or several, of different models, side by side.

    DIR is a folder of `lumos generate`, or of videos named PROMPT-NUMBER.mp4. `lumos evaluate folders --help`: options.
    """


def _record_options(function: Any) -> Any:
    for option in (
        click.option("--step", type=click.IntRange(min=0), help="Of the checkpoint; else the run's last."),
        click.option("--tracking-uri", help="The MLflow store; else mlruns.db here, or beside an output."),
        click.option("--run", "runs", multiple=True, help="MLflow run: output folder, id or name; one for each DIR."),
    ):
        function = option(function)
    return function


def _record_config(options: dict[str, Any]) -> Any:
    from pipelines.evaluation.recording import RecordConfig

    return RecordConfig(**{name: options.pop(name) for name in ("runs", "tracking_uri", "step")})


def _tell(report: Any) -> None:
    click.echo(report.text)
    for line in report.asides:
        click.echo(line, err=True)


@command.command("folders", short_help="Metrics and a gallery; what `lumos evaluate DIR` does.")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", help="Folder of results, local or s3://; else that of the first DIR and -evaluation.")
@click.option("--reference", help="Folder of real videos to compare with: one of each prompt and seed, or a set.")
@click.option("--clip", help="open_clip weights, file or folder: adds CLIP similarity, consistency, CMMD.")
@click.option("--clip-model", default="ViT-L-14-336", show_default=True, help="Architecture of a file of weights.")
@click.option("--lpips", help="TorchScript file (vgg16.pt): adds LPIPS, with --reference.")
@click.option("--fvd", help="TorchScript file (i3d_torchscript.pt): adds FVD, with --reference.")
@click.option("--device", default="cpu", show_default=True, help="Where these models run.")
@_record_options
@click.option(
    "--gallery", type=click.Choice(_FORMS), default="auto", show_default=True, help="Videos within it or not."
)
@click.option("--page-mb", type=click.FloatRange(min=0), default=40.0, show_default=True, help="Of videos in a page.")
def folders(**options: Any) -> None:
    """Measure every video of each DIR: a table, evaluation.json, videos.jsonl and gallery.html.

    They also go to the MLflow run that made the model, if the folder's notes lead to it; --run names it, or is `none`.
    """
    from pipelines.evaluation.evaluate import EvaluateConfig
    from pipelines.evaluation.models import ModelFiles
    from pipelines.evaluation.run import run_evaluation

    record = _record_config(options)
    models = ModelFiles(**{name: options.pop(name) for name in ("clip", "clip_model", "lpips", "fvd", "device")})
    _tell(run_evaluation(EvaluateConfig(models=models, **options), record))


@command.command("import", short_help="Official results and their published totals.")
@click.argument("files", nargs=-1, required=True, metavar="FILES...")
@click.option("--benchmark", type=click.Choice(ACCEPTED_NAMES), help="Else told from what the files hold.")
@click.option("--out", help="JSON file for the result, local or s3://.")
@_record_options
def import_(files: tuple[str, ...], benchmark: str | None, out: str | None, **options: Any) -> None:
    """Read what VBench (*_eval_results.json) or GenEval (results.jsonl) wrote, and compute the published totals."""
    from pipelines.evaluation.run import run_import

    _tell(run_import(files, _record_config(options), benchmark=benchmark, out=out))


if __name__ == "__main__":
    run(command)
