"""The demo from end to end: render, curate, train, serve and generate, judge, report.

Every phase calls the function behind its own command, with the shipped `demo` configs, on one Ray cluster.
"""

import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.cluster import connect
from pipelines.config import load_config
from pipelines.data.config import CurateConfig
from pipelines.data.curate import curate
from pipelines.demo.judge import Reading, judge_video, score
from pipelines.demo.report import LedgerRow, LossPoint, Report, Sample, write_report
from pipelines.errors import UserError
from pipelines.generation.config import GenerateConfig
from pipelines.generation.manifest import MANIFEST_FILE
from pipelines.generation.run import generate
from pipelines.memory import sampled_memory, tree_memory
from pipelines.sample_corpus import BAD_FILES, ClipSpec, held_out_specs, write_corpus
from pipelines.training.config import TrainConfig
from pipelines.training.run import TrainResult, train

NUM_CLIPS = 800
SEEDS_PER_PROMPT = 2
_MEMORY_SECONDS = 3.0  # between two samples of the memory in use


def demo(out: Path, seed: int, *, num_clips: int = NUM_CLIPS, train_overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo into a new or empty folder.

    Writes corpus/, dataset/, train/, prompts.csv, videos/, report.html and summary.json.

    Args:
        out: The folder.
        seed: Of the corpus, the training and the sampling.
        num_clips: Clips to render, besides the bad files.
        train_overrides: Further overrides of the train config, such as "steps=20" for a quick try.

    Returns:
        The content of summary.json (contracts.md, "Demo").

    Raises:
        UserError: `out` is a file or not empty.
        JobError: A phase failed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is no empty folder; name another one, or remove it to run the demo anew")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    seconds: dict[str, float] = {}
    begin = time.monotonic()
    with sampled_memory(tree_memory, _MEMORY_SECONDS) as memory, connect():
        with _phase("corpus", f"{num_clips} clips and {len(BAD_FILES)} files that must not be kept", seconds):
            write_corpus(out / "corpus", seed, num_clips)
            specs = held_out_specs(seed)
            _write_prompts(out / "prompts.csv", specs, seed)
        with _phase("curate", "probe, score, decide, tokenize, publish", seconds):
            paths: dict[str, object] = {"source.path": out / "corpus", "dataset": out / "dataset"}
            curated = curate(load_config(CurateConfig, "demo", _overrides(**paths)))
        with _phase("train", "a model from scratch", seconds):
            paths = {"data.dataset": curated.snapshot_uri, "output": out / "train"}
            trained = train(load_config(TrainConfig, "demo", [*_overrides(**paths, seed=seed), *train_overrides]))
        with _phase("generate", f"{len(specs) * SEEDS_PER_PROMPT} videos through Ray Serve", seconds):
            paths = {"model": trained.export_dir, "prompts": out / "prompts.csv", "output": out / "videos"}
            generate(load_config(GenerateConfig, "demo", _overrides(**paths, seeds_per_prompt=SEEDS_PER_PROMPT)))
    with _phase("judge", "colour, background, shape and direction from pixels", seconds):
        samples = judge_folder(out / "videos", specs)
        result = score([sample.read for sample in samples], [sample.asked for sample in samples])
    with _phase("report", str(out / "report.html"), seconds):
        ledger = read_ledger(curated.snapshot_uri)
        summary = {
            "schema": 1,
            "seed": seed,
            "seconds": seconds | {"total": time.monotonic() - begin},
            "peak_memory_gb": max(memory) / 1e9,
            "clips": _count_clips(ledger),
            "train": {"steps": trained.steps, **trained.metrics},
            "samples": len(samples),
            "accuracy": result.accuracy,
            "chance": result.chance,
            "interval95": result.interval95,
        }
        page = Report(
            summary=summary,
            samples=samples,
            losses=[LossPoint(step=row.step, loss=row.loss, frames=row.frame_losses) for row in trained.records],
            not_kept=[row for row in ledger if row.status != "kept"],
            next_steps=_next_steps(out, trained, samples),
        )
        write_report(out / "report.html", page)
    summary["seconds"] = seconds | {"total": time.monotonic() - begin}
    rounded: dict[str, Any] = _rounded(summary)
    (out / "summary.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    return rounded


@contextmanager
def _phase(name: str, what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a phase, with a line at its begin and at its end."""
    _say(f"[{name}] {what}")
    begin = time.monotonic()
    yield
    seconds[name] = time.monotonic() - begin
    _say(f"[{name}] done in {seconds[name]:.1f} s")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _overrides(**values: object) -> list[str]:
    return [f"{key}={json.dumps(value if isinstance(value, int) else str(value))}" for key, value in values.items()]


def _write_prompts(path: Path, specs: Sequence[ClipSpec], seed: int) -> None:
    """The captions of held-out clips; the id is the clip's place in `specs`. No two videos share a sampling seed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "seed", "id"))
        for index, spec in enumerate(specs):
            writer.writerow((spec.caption, (seed * len(specs) + index) * SEEDS_PER_PROMPT, index))


# --------------------------------------------------------------------------------------- what the phases left behind


def judge_folder(folder: Path, specs: Sequence[ClipSpec]) -> list[Sample]:
    """Judge the videos that a bulk run made of the captions of `specs`, in the order of prompts and seeds."""
    lines = (folder / MANIFEST_FILE).read_text(encoding="utf-8").split("\n")
    samples = []
    for row in sorted(map(json.loads, filter(None, lines)), key=lambda row: (row["index"], row["seed"])):
        spec = specs[int(row["id"])]
        samples.append(
            Sample(
                prompt=row["prompt"],
                seed=row["seed"],
                video=folder / row["path"],
                asked=Reading(color=spec.color, background=spec.background, shape=spec.shape, direction=spec.direction),
                read=judge_video(_decode(folder / row["path"])),
            )
        )
    return samples


def _decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_ledger(snapshot: str) -> list[LedgerRow]:
    """The rows of a snapshot's ledger."""
    table = pq.read_table(Path(snapshot) / "ledger.parquet", columns=["path", "status", "reason"])
    return [
        LedgerRow(path=Path(row["path"]).name, status=row["status"], reason=row["reason"] or "")
        for row in table.to_pylist()
    ]


def _count_clips(ledger: Sequence[LedgerRow]) -> dict[str, int]:
    counts = Counter(row.status for row in ledger)
    statuses = ("kept", "rejected", "failed", "duplicate")
    return {"sources": len({row.path for row in ledger}), **{status: counts[status] for status in statuses}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _next_steps(out: Path, trained: TrainResult, samples: Sequence[Sample]) -> list[tuple[str, str]]:
    prompt, model = samples[0].prompt, trained.export_dir
    return [
        ("A video of your own words:", f'lumos generate --model {model} --prompt "{prompt}" --out video.mp4 --seed 7'),
        ("The model behind HTTP:", f"lumos serve default model={model}"),
        (
            "Train for longer on the same data; or change any other key that --print-config shows:",
            f"lumos train demo data.dataset={out / 'dataset'} output={out / 'train-long'} steps=2000",
        ),
        ("Compare the runs:", trained.store.how_to_open),
        (
            "Curate your own videos (captions come from captions.csv, or from a .txt file beside each):",
            "lumos curate /path/to/videos",
        ),
    ]
