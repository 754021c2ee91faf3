"""The demo from end to end: render, curate, train, serve and generate, judge, report.

Every phase calls the function behind its own command, with the shipped `demo` configs, on one Ray cluster.
"""

import csv
import functools
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic

import av
import click
import numpy as np
from numpy.typing import NDArray

from lumos.checkpoint import read_config
from pipelines.cluster import connect
from pipelines.config import ConfigT, load_config
from pipelines.data.config import CurateConfig
from pipelines.data.curate import curate
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.snapshot.schemas import STATUSES
from pipelines.errors import UserError
from pipelines.evaluation.judge import ATTRIBUTES, Reading, asked_for_by, judge_video, score
from pipelines.generation.bulk.manifest import MANIFEST_FILE
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import GenerateConfig
from pipelines.memory import sampled_memory, tree_memory
from pipelines.pages.plots import Points, line_chart, smooth
from pipelines.pages.render import write_page
from pipelines.sample_corpus import (
    BAD_FILES,
    FPS,
    NUM_FRAMES,
    ClipSpec,
    held_out_specs,
    render_clip,
    write_corpus,
    write_video,
)
from pipelines.training.config import TrainConfig
from pipelines.training.record import StepRecord
from pipelines.training.run import TrainResult, train

NUM_CLIPS = 1600  # with 800, 560 steps fitted them by heart: validation rose after 420
SEEDS_PER_PROMPT = 2
_MEMORY_SECONDS = 3.0  # between two samples of the memory in use
TARGETS = {"color": 0.95, "background": 0.95, "direction": 0.75, "shape": 0.60}

_NAMES = {
    "strict": "All five",
    "color": "Colour",
    "background": "Background",
    "direction": "Direction",
    "size": "Size",
    "shape": "Shape",
    "shape_frames": "Shape, by frame",
    "constancy": "Constant area",
    "all": "Four, loosely",
}
_WINDOW = 21  # steps in a smoothed curve
_MOST_REJECTED = 25  # rows of the ledger shown
_PLAIN_PATH = r"(/|[a-z0-9]+://)[\w./-]*"


@dataclass(frozen=True)
class Command(Generic[ConfigT]):
    """A ``lumos`` command with the shipped `demo` config: what a phase runs, and what the report prints of it."""

    config_class: type[ConfigT]
    overrides: tuple[str, ...]

    @property
    def config(self) -> ConfigT:
        """What the command resolves to."""
        return load_config(self.config_class, "demo", self.overrides)

    def __str__(self) -> str:
        return shlex.join(["lumos", self.config_class.KIND, "demo", *self.overrides])


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated video: its prompt, its file, a real clip of that prompt, what was asked for and what was read."""

    prompt: str
    seed: int
    video: Path
    real: Path
    asked: Reading
    read: Reading

    @property
    def right(self) -> Mapping[str, bool]:
        """Whether each attribute was read as it was asked for; the shape in three quarters of the frames."""
        right = {name: getattr(self.read, name) == getattr(self.asked, name) for name in ATTRIBUTES}
        return right | {"shape": self.read.steady_shape == self.asked.shape}

    @property
    def right_frames(self) -> Sequence[bool]:
        """Whether each frame alone shows the shape asked for."""
        return [shape == self.asked.shape for shape in self.read.frame_shapes]


def demo(out: Path, seed: int, *, num_clips: int = NUM_CLIPS) -> dict[str, Any]:
    """Run the demo into a new or empty folder.

    Writes corpus/, dataset/, train/, prompts.csv, videos/, real/ (a clip of each prompt, to compare with), report.html
    and summary.json.

    Args:
        out: The folder.
        seed: Of the corpus, the training and the sampling.
        num_clips: Clips to render, besides the bad files.

    Returns:
        The content of summary.json (contracts.md, "Demo").
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
            curating = Command(CurateConfig, _overrides(**paths))
            curated = curate(curating.config)
        with _phase("train", "a model from scratch", seconds):
            paths = {"data.dataset": curated.snapshot_uri, "output": out / "train"}
            training = Command(TrainConfig, _overrides(**paths, seed=seed))
            trained = train(training.config)
        with _phase("generate", f"{len(specs) * SEEDS_PER_PROMPT} videos through Ray Serve", seconds):
            paths = {"model": trained.export_dir, "prompts": out / "prompts.csv", "output": out / "videos"}
            generating = Command(GenerateConfig, _overrides(**paths, seeds_per_prompt=SEEDS_PER_PROMPT))
            generate(generating.config)
    with _phase("judge", "colour, background, direction, size and shape from pixels", seconds):
        samples = judge_folder(out / "videos", specs, write_real_clips(out / "real", specs))
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
            "sampling": asdict(generating.config.sampling.over(read_config(trained.export_dir)[2].sampling)),
            **vars(result),
        }
        write_report(
            out / "report.html",
            summary=summary,
            samples=samples,
            records=trained.records,
            not_kept=[row for row in ledger if row["status"] != "kept"],
            next_steps=[
                ("This page's dataset was made by:", str(curating)),
                ("Its model:", str(training)),
                ("Its videos, which the same command makes again, byte for byte, in another output:", str(generating)),
                *_next_steps(out, trained, samples),
            ],
        )
    summary["seconds"] = seconds | {"total": time.monotonic() - begin}
    rounded: dict[str, Any] = json.loads(json.dumps(summary), parse_float=lambda text: round(float(text), 4))
    (out / "summary.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    return rounded


@contextmanager
def _phase(name: str, what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a phase, with a line at its begin and at its end."""
    click.echo(f"[{name}] {what}")
    begin = time.monotonic()
    yield
    seconds[name] = time.monotonic() - begin
    click.echo(f"[{name}] done in {seconds[name]:.1f} s")


def _overrides(**values: object) -> tuple[str, ...]:
    """Overrides that give the keys these values: paths as they are where YAML reads them so, else in quotes."""
    plain = {key: value if isinstance(value, int) else str(value) for key, value in values.items()}
    return tuple(
        f"{key}={value if isinstance(value, str) and re.fullmatch(_PLAIN_PATH, value) else json.dumps(value)}"
        for key, value in plain.items()
    )


def _write_prompts(path: Path, specs: Sequence[ClipSpec], seed: int) -> None:
    """The captions of held-out clips; the id is the clip's place in `specs`. No two videos share a sampling seed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "seed", "id"))
        for index, spec in enumerate(specs):
            writer.writerow((spec.caption, (seed * len(specs) + index) * SEEDS_PER_PROMPT, index))


def write_real_clips(folder: Path, specs: Sequence[ClipSpec]) -> list[Path]:
    """What a perfect model would make of the captions of `specs`, but for the place: rendered, in the demo's size."""
    folder.mkdir()
    paths = [folder / f"{index:05d}.mp4" for index in range(len(specs))]
    for path, spec in zip(paths, specs, strict=True):
        write_video(path, render_clip(spec)[:, ::2, ::2])
    return paths


def judge_folder(folder: Path, specs: Sequence[ClipSpec], real: Sequence[Path]) -> list[Sample]:
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
                real=real[int(row["id"])],
                asked=asked_for_by(spec),
                read=judge_video(_decode(folder / row["path"])),
            )
        )
    return samples


def _decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_ledger(snapshot: str) -> list[dict[str, str]]:
    """File name (as ``path``), status and reason of each row of a snapshot's ledger."""
    rows = open_snapshot(snapshot).read_ledger(["path", "status", "reason"]).to_pylist()
    return [row | {"path": Path(row["path"]).name} for row in rows]


def _count_clips(ledger: Sequence[Mapping[str, str]]) -> dict[str, int]:
    counts = Counter(row["status"] for row in ledger)
    return {"sources": len({row["path"] for row in ledger}), **{status: counts[status] for status in STATUSES}}


def _next_steps(out: Path, trained: TrainResult, samples: Sequence[Sample]) -> list[tuple[str, str]]:
    first, model = samples[0], trained.export_dir
    longer: dict[str, object] = {"data.dataset": out / "dataset", "output": out / "train-long", "steps": 2000}
    model_option = shlex.join(["--model", str(model)])
    prompt = shlex.join(["--prompt", first.prompt])
    return [
        (
            "The first of them alone, byte for byte; put in words of your own:",
            f"lumos generate {model_option} {prompt} --seed {first.seed} --out video.mp4",
        ),
        ("The model behind HTTP:", shlex.join(["lumos", "serve", "default", *_overrides(model=model)])),
        (
            "Train for longer on the same data; or change any other key that --print-config shows:",
            str(Command(TrainConfig, _overrides(**longer))),
        ),
        ("Compare the runs:", trained.store.how_to_open),
        (
            "Curate your own videos (captions come from captions.csv, or from a .txt file beside each):",
            "lumos curate /path/to/videos",
        ),
    ]


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
    records: Sequence[StepRecord],
    not_kept: Sequence[Mapping[str, str]],
    next_steps: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page.

    Args:
        path: File to write; replaced if there.
        summary: The content of summary.json.
        samples: All generated videos, whose files are copied into the page; those of one prompt stand together.
        records: The training curve.
        not_kept: Path, status and reason of the ledger's rows whose status is not "kept".
        next_steps: (what it does, command) pairs.
    """
    by_prompt = [list(group) for _, group in groupby(samples, key=lambda sample: sample.prompt)]
    errors = [any(not all(sample.right.values()) for sample in group) for group in by_prompt]
    chart = functools.partial(line_chart, x_label="step", y_label="nats per token")
    loss = [(float(row.step), row.loss) for row in records]
    lines = {"each step": loss, "smoothed": smooth(loss, _WINDOW)}
    write_page(
        path,
        "demo_report.html.j2",
        summary=summary,
        not_kept=not_kept,
        next_steps=next_steps,
        prompts=list(zip(by_prompt, errors, strict=True)),
        num_errors=sum(errors),
        names=_NAMES,
        targets=TARGETS,
        fps=FPS,
        num_frames=NUM_FRAMES,
        most_rejected=_MOST_REJECTED,
        loss_chart=chart(lines, title="Training loss by step", faint=["each step"]),
        frame_chart=chart(_frame_lines(records), title="Loss by latent frame", at_ends=True),
    )


def _frame_lines(records: Sequence[StepRecord]) -> dict[str, Points]:
    lines = {}
    for frame in range(max((len(row.frame_losses) for row in records), default=0)):
        points = [(float(row.step), row.frame_losses[frame]) for row in records if len(row.frame_losses) > frame]
        lines[f"frame {frame + 1}"] = smooth(points, _WINDOW)
    return lines
