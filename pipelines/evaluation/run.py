"""The verbs of ``lumos evaluate``: measure folders, read official results; write files, record in MLflow."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import storage
from pipelines.errors import JobError, UserError
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation.gallery import write_gallery
from pipelines.evaluation.official import import_results
from pipelines.evaluation.recording import NONE, RecordConfig, Recorder, recorders, run_values
from pipelines.evaluation.results import FIGURES_FILE, VIDEOS_FILE, as_text, begin_results, write_results


@dataclass(frozen=True)
class Report:
    """What a verb tells."""

    text: str
    asides: tuple[str, ...]  # where things are, and what was not done


def run_evaluation(config: EvaluateConfig, record: RecordConfig) -> Report:
    """Measure folders, and leave the results in files and on runs.

    Raises:
        UserError: if folders, models or runs cannot be used; found before anything is measured.
        JobError: if no video of a folder can be read, or results cannot be left.
    """
    targets, asides = recorders(config.read_folders(), record)
    begin_results(config.output)
    evaluation = evaluate(config)
    write_results(config.output, evaluation)
    files = [storage.join(config.output, name) for name in (FIGURES_FILE, VIDEOS_FILE)]
    if config.gallery == "none":
        asides.append(f"results: {config.output}")
    else:
        gallery = write_gallery(config.output, evaluation)
        files += [gallery.page] if gallery.whole else []  # MLflow shows a file alone
        asides.append(f"open {gallery.page}")
    # Of a run that nobody named it is said how it was found, and how another is chosen.
    choice = (
        "" if record.runs else f", where the model of these videos says it was trained; --run names another, or {NONE}"
    )
    for run, target in zip(evaluation.runs, targets, strict=True):
        if target is not None:
            label = run.folder.label.replace("/", "-")
            asides.append(f"{run.folder.label}: {target.record(run_values(run), files, label=label)}{choice}")
    return Report(as_text(evaluation), tuple(asides))


def run_import(files: Sequence[str], record: RecordConfig, *, benchmark: str | None, out: str | None) -> Report:
    """Read official results, and leave them in a file and on a run.

    Raises:
        UserError: if files or the run cannot be used.
        JobError: if results cannot be left.
    """
    if len(record.runs) > 1:
        raise UserError("--run names several runs for the results of one model: name one")
    results = import_results(files, benchmark=benchmark)
    target = Recorder(record.runs[0], record) if record.runs and record.runs[0] != NONE else None
    asides = []
    if out is not None:
        try:
            storage.write_json_atomic(out, results.as_json())
        except OSError as error:
            raise JobError(f"--out {out} cannot be written ({error}): name another file") from error
        asides.append(f"results: {out}")
    if target is not None:
        asides.append(target.record(results.metrics(), files, label=results.benchmark))
    return Report(str(results), tuple(asides))
