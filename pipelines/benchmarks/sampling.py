"""What shortcuts of the sampler, and the share of hidden history, do to videos of the demo's model, and to their time.

Every way draws the same prompts with the same seeds, batch by batch in turns, so that times compare; the demo's judge
reads the videos.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lumos.api import Model, load
from lumos.config import SamplingConfig, ShortcutConfig
from lumos.sampling import generate
from pipelines.benchmarks.machine import describe_machine
from pipelines.errors import UserError
from pipelines.evaluation.judge import asked_for, judge_video
from pipelines.evaluation.metrics import Sample, frame_consistency, temporal_flickering
from pipelines.pages.plots import line_chart
from pipelines.pages.render import write_page
from pipelines.sample_corpus import held_out_specs
from pipelines.statistics import bootstrap_interval

FULL = "full"
BF16 = "bfloat16"  # the full sampler, with weights and products in it
MEASURES = {
    "all": "share of videos with the prompted colour, background, shape and direction",
    "strict": "the same with the size, and the shape in three quarters of the frames",
    "flicker": "VBench's temporal flickering, 1 where nothing changes",
    "consistency": "mean SSIM of successive frames",
}
_BATCH = 8
_HISTORY = (0.0, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class SamplingBenchmark:
    """What is drawn."""

    model: str  # folder of a model that the demo trained
    prompts: int = 32  # held-out combinations
    seeds: int = 3
    threads: int = 2
    only: tuple[str, ...] = field(default=())  # ways; none: all


def ways(recommended: SamplingConfig) -> dict[str, SamplingConfig]:
    """The full sampler, each shortcut alone, some together, and other shares of hidden history, by name."""
    steps = recommended.num_steps
    half = max(1, steps // 2)
    shortcuts: dict[str, dict[str, Any]] = {
        "half the steps": {"num_steps": half},
        "Halton order": {"order": "halton"},
        "Halton order, half the steps": {"num_steps": half, "order": "halton"},
        "half the steps, guidance in their first half": {"num_steps": half, "guidance_interval": (0.0, 0.5)},
        "half the steps, difference reused from half on": {"num_steps": half, "guidance_cache_from": 0.5},
        "threshold 0.9": {"threshold": 0.9},
        "threshold 0.7": {"threshold": 0.7},
        "guidance in the first half": {"guidance_interval": (0.0, 0.5)},
        "difference reused from half on": {"guidance_cache_from": 0.5},
        "whole pass every 2nd step": {"context_refresh": 2},
        "whole pass every 3rd step": {"context_refresh": 3},
        "half the steps from frame 2 on": {"frame_steps": (steps, half)},
        "a quarter of the steps from frame 2 on": {"frame_steps": (steps, max(1, steps // 4))},
        "two thirds of the steps, a third from frame 2 on": {
            "frame_steps": (max(1, 2 * steps // 3), max(1, steps // 3))
        },
        "half the steps, a third from frame 2 on": {"frame_steps": (half, max(1, steps // 3))},
        "reuse, every 2nd step": {"guidance_cache_from": 0.5, "context_refresh": 2},
        "threshold 0.7, reuse, every 2nd step": {
            "threshold": 0.7,
            "guidance_cache_from": 0.5,
            "context_refresh": 2,
        },
    }
    found = dict.fromkeys((FULL, BF16), replace(recommended, shortcuts=None))
    for name, given in shortcuts.items():
        changes = dict(given)
        number = changes.pop("num_steps", steps)
        found[name] = replace(recommended, num_steps=number, shortcuts=ShortcutConfig(**changes) if changes else None)
    for ratio in _HISTORY:
        found[f"history ratio {ratio:g}"] = replace(recommended, history_ratio=ratio, shortcuts=None)
    return found


def run_sampling_benchmark(config: SamplingBenchmark, page: Path | None) -> dict[str, Any]:
    """Draw and judge; write the page, if one is asked for.

    Returns:
        JSON-able: for every way ``seconds`` (a video, of the sampler alone), ``speed`` (of the full sampler's time),
        and each of ``MEASURES`` with its 95 % interval by a bootstrap over prompts, and the interval of its difference
        to the full sampler on the same prompts and seeds.

    Raises:
        UserError: if the model cannot be used, or a way is unknown.
    """
    torch.set_num_threads(config.threads)
    try:
        model = load(config.model)
        in_bf16 = load(config.model, dtype=torch.bfloat16)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--model: {error}") from error
    known = ways(model.info.sampling)
    unknown = [name for name in config.only if name not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is no way to draw; known: {', '.join(known)}")
    names = [name for name in known if not config.only or name in (FULL, *config.only)]
    prompts = [spec.caption for spec in held_out_specs(0)[: config.prompts]]
    values = {name: {measure: np.zeros((len(prompts), config.seeds)) for measure in MEASURES} for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for each in (model, in_bf16):  # the first videos of a process take longer
        _draw(each, prompts[:1], known[FULL], first_seed=0)
    with tqdm(total=len(names) * len(prompts) * config.seeds, desc="videos", unit="video") as bar:
        for seed in range(config.seeds):
            for start in range(0, len(prompts), _BATCH):
                batch = prompts[start : start + _BATCH]
                for name in names:
                    drawing = in_bf16 if name == BF16 else model
                    videos, spent = _draw(drawing, batch, known[name], first_seed=10_000 + seed * 1000 + start)
                    seconds[name] += spent
                    for number, (prompt, frames) in enumerate(zip(batch, videos, strict=True)):
                        for measure, value in _measure(prompt, frames).items():
                            values[name][measure][start + number, seed] = value
                    bar.update(len(batch))
    count = len(prompts) * config.seeds
    found = {
        name: {
            "seconds": seconds[name] / count,
            "speed": seconds[FULL] / seconds[name],
            "sampling": asdict(known[name]),
            **{measure: _figures(values[name][measure], values[FULL][measure]) for measure in MEASURES},
        }
        for name in names
    }
    result = {
        "schema": 1,
        "videos_of_each": count,
        "ways": found,
        "config": asdict(config),
        "load": os.getloadavg(),
        "machine": describe_machine(),
    }
    if page is not None:
        _write(page, result)
    return result


def _draw(
    model: Model, prompts: Sequence[str], sampling: SamplingConfig, *, first_seed: int
) -> tuple[list[NDArray[np.uint8]], float]:
    """Videos of prompts, and the seconds that the sampler took."""
    size = model.encoder.size(width=None, height=None, num_frames=None, fps=None)
    requests = [
        model.encoder.encode(prompt, size=size, seed=first_seed + number, sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    begin = time.perf_counter()
    codes = generate(model.decoder, model.folder.vocabulary, requests)
    spent = time.perf_counter() - begin
    return [model.tokenizer.decode(torch.from_numpy(each)[None])[0].cpu().numpy() for each in codes], spent


def _measure(prompt: str, frames: NDArray[np.uint8]) -> dict[str, float]:
    asked, seen = asked_for(prompt), judge_video(frames)
    assert asked is not None
    sample = Sample(frames, 1.0, prompt=prompt)
    plain = ("color", "background", "shape", "direction")
    return {
        "all": float(all(getattr(seen, name) == getattr(asked, name) for name in plain)),
        "strict": float(seen.strict() == asked.strict()),
        "flicker": temporal_flickering(sample) or 0.0,
        "consistency": frame_consistency(sample) or 0.0,
    }


def _figures(values: NDArray[np.float64], full: NDArray[np.float64]) -> dict[str, Any]:
    """Mean and intervals of values [prompts, seeds]."""
    return {
        "mean": float(values.mean()),
        "interval95": _interval(values.mean(axis=1)),
        "difference95": _interval((values - full).mean(axis=1)),
    }


def _interval(by_prompt: NDArray[np.float64]) -> tuple[float, float] | None:
    return bootstrap_interval(len(by_prompt), partial(_weighted_mean, by_prompt))


def _weighted_mean(by_prompt: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = counts @ by_prompt / counts.sum(axis=1)
    return means


def lines(result: Mapping[str, Any]) -> list[str]:
    """A line about every way, for the terminal."""
    rows = []
    for name, row in result["ways"].items():
        shares = ", ".join(f"{measure} {row[measure]['mean']:.3f}" for measure in MEASURES)
        rows.append(f"{name}: {row['speed']:.2f}x, {row['seconds']:.2f} s a video, {shares}")
    return rows


def _write(page: Path, result: dict[str, Any]) -> None:
    history = [(float(name.rpartition(" ")[2]), row) for name, row in result["ways"].items() if name.startswith("hist")]
    chart = line_chart(
        {measure: [(ratio, row[measure]["mean"]) for ratio, row in history] for measure in MEASURES},
        title="Accuracy, flicker and consistency by history ratio",
        x_label="history ratio",
        y_label="share, or score",
        at_ends=True,
        linear=True,
    )
    write_page(
        page,
        "sampling_report.html.j2",
        result=result,
        measures=MEASURES,
        shortcuts={name: row for name, row in result["ways"].items() if not name.startswith("history")},
        history={f"{ratio:g}": row for ratio, row in history},
        history_chart=chart if len(history) > 1 else None,
    )
