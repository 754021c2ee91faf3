"""Which way of drawing videos a finished model's folder recommends: tried at the end, on held-out prompts.

Ray tasks draw a video of every prompt in every way, where the workers of the training were and with what a worker
reserves. No error of theirs is more than a warning: the folder then recommends what the config does.

The answer is kept with its question in ``sampling_choice.json`` of the output: the same command does not seek it again,
and one that was killed before it was written begins the trial anew.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from lumos.config import SamplingConfig
from lumos.guidance import count_passes
from pipelines import storage
from pipelines.cluster import connect, lacking
from pipelines.data.models.open_clip import load_open_clip
from pipelines.errors import JobError, in_words
from pipelines.evaluation.judge import asked_for, judge_video
from pipelines.statistics import bootstrap_interval
from pipelines.streams import numpy_stream
from pipelines.training.checkpoints import StoredCheckpoint
from pipelines.training.config import LEAST_PROMPTS, SamplingTrialConfig, TrainConfig
from pipelines.training.launch import worker_resources, worker_threads
from pipelines.training.output import Output
from pipelines.training.prepare import PreparedRun
from pipelines.training.progress import VideoProgress
from pipelines.training.sample import clip_similarities, first_captions, load_model
from pipelines.training.validate import choose_rows

logger = logging.getLogger(__name__)

Measure = Literal["judge_strict", "clip_similarity"]

_BATCH = 8  # videos drawn together
_SILENCE = 1800.0  # seconds without any video after which the trial is given up
_CANCEL_SECONDS = 2.0  # that a task has to end
_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A way of drawing and what came of it."""

    sampling: SamplingConfig
    values: tuple[float, ...]  # of the video of each prompt; higher is better
    seconds: float  # of a video, as one task draws it

    @property
    def mean(self) -> float:
        """Over the prompts."""
        return fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean, at 95 %, by a bootstrap over the prompts."""
        return _interval(self.values)

    def gain(self, configured: "Tried") -> tuple[float, float] | None:
        """Interval of the mean of the differences to another way, prompt by prompt; None of too few prompts."""
        return _interval([ours - theirs for ours, theirs in zip(self.values, configured.values, strict=True)])


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < LEAST_PROMPTS:
        return None
    return bootstrap_interval(len(values), lambda counts: counts @ np.array(values) / len(values))


def choose(tried: Sequence[Tried], num_latents: int) -> int:
    """The number of the way to recommend for videos of so many latent frames; 0 is the configured one.

    A candidate replaces it if its gain is more than chance would have: if the 95 % interval of the differences, prompt
    by prompt (prompts and seeds are the same, so what is hard for all ways cancels), lies above 0. Of several such the
    best mean is taken, of equal ones the fewest passes, then the first.

    A higher mean alone would not do. Of four candidates as good as the configured way, the luckiest has a higher one in
    3 of 4 trials, be it on 32 or 128 prompts (simulated, for shares of right videos): the recommendation would follow
    the draw, and the mean told of it would be too high, which is the winner's curse. By the interval it is 7 in 100.
    That is not corrected for the number of candidates: one that is taken by luck is most likely about as good, as a
    worse one needs more luck (of four that are right in 20 % of the videos in place of 30 %, one is taken in 1 of 100
    trials on 32 prompts, and in fewer on more).
    """
    better = [number for number, way in enumerate(tried) if number and (way.gain(tried[0]) or (0.0,))[0] > 0]
    return min(
        better, key=lambda n: (-round(tried[n].mean, 9), count_passes(tried[n].sampling, num_latents), n), default=0
    )


def recommend(run: PreparedRun, output: Output, stored: StoredCheckpoint) -> SamplingConfig | None:
    """What the folder of a checkpoint's model is to recommend; None: what the run's config does.

    An error is logged, and no reason to end a training.
    """
    if run.config.sampling_choice is None:
        return None
    try:
        return _recommend(run, output, stored, run.config.sampling_choice)
    except Exception as error:  # noqa: BLE001 - as the docstring says
        logger.warning(
            "sampling_choice: %s; the model's folder recommends what the config does. The same command tries again",
            in_words(error, last_line=True),
        )
        return None


def describe(run: PreparedRun) -> str | None:
    """What is missing of a trial that is asked for; None if nothing is."""
    return None if run.config.sampling_choice is None else _lack(run.config, held_out_prompts(run))


def held_out_prompts(run: PreparedRun) -> tuple[str, ...]:
    """The prompts of a trial: captions of held-out rows, no two alike, drawn by its seed."""
    trial = run.config.sampling_choice
    assert trial is not None
    rows = choose_rows(run)
    order = numpy_stream(trial.seed, "sampling choice").permutation(len(rows))
    return tuple(dict.fromkeys(first_captions(run, (rows[index] for index in order))))[: trial.prompts]


def measure_of(config: TrainConfig, prompts: Sequence[str]) -> Measure | None:
    """What can rate videos of these prompts."""
    if all(asked_for(prompt) is not None for prompt in prompts):
        return "judge_strict"
    return "clip_similarity" if config.samples.clip is not None and config.samples.clip.weights else None


def _lack(config: TrainConfig, prompts: Sequence[str]) -> str | None:
    if len(prompts) < LEAST_PROMPTS:
        why = f"the held-out rows have {len(prompts)} different captions, which are too few to tell ways apart"
    elif measure_of(config, prompts) is None:
        why = "the judge reads the demo's prompts alone, and samples.clip names no weights"
    else:
        return None
    return f"sampling_choice: {why}; the model's folder recommends what the config does"


def _recommend(
    run: PreparedRun, output: Output, stored: StoredCheckpoint, trial: SamplingTrialConfig
) -> SamplingConfig | None:
    ways = trial.ways(run.config.recommended_sampling)
    question = _question(run, output, stored)
    if (chosen := _answer(output, question)) is not None:
        return ways[chosen]
    output.sampling_choice.unlink(missing_ok=True)  # of another question
    prompts = held_out_prompts(run)
    measure, lack = measure_of(run.config, prompts), _lack(run.config, prompts)
    videos = len(ways) * len(prompts)
    with VideoProgress("sampling_choice", 0 if lack else videos, enabled=run.config.progress) as progress:
        if measure is None or lack:
            progress.say(str(lack))
            return None
        progress.say(f"sampling_choice: {len(ways)} ways on {len(prompts)} held-out prompts")
        with connect():
            tried = _try_all(run, stored, prompts, measure, progress)
        chosen = choose(tried, run.info.shapes[0][0])
        _write(output, question, prompts, tried, measure=measure, chosen=chosen)
        progress.say(_told(tried, chosen, measure))
    return ways[chosen]


def _question(run: PreparedRun, output: Output, stored: StoredCheckpoint) -> dict[str, Any]:
    """All that decides the answer, as plain values."""
    config = run.config
    assert config.sampling_choice is not None
    question = {
        "run": output.identity_hash,
        "dataset": run.dataset_digest,
        "step": stored.state.step,
        "recommended_sampling": asdict(config.recommended_sampling),
        "sampling_choice": asdict(config.sampling_choice),
        "validation": [config.validation.rows, config.validation.split, config.validation.seed],
        "clip": asdict(config.samples.clip) if config.samples.clip else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(question))
    return plain


def _answer(output: Output, question: dict[str, Any]) -> int | None:
    """The number of the way that was chosen, if this was the question."""
    try:
        said = json.loads(output.sampling_choice.read_text(encoding="utf-8"))
        return int(said["chosen"]) if said["question"] == question else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _write(
    output: Output, question: dict[str, Any], prompts: Sequence[str], tried: Sequence[Tried], **found: Any
) -> None:
    ways = [
        {
            "sampling": asdict(way.sampling),
            "mean": way.mean,
            "interval95": way.interval,
            "gain": way.mean - tried[0].mean,
            "gain_interval95": way.gain(tried[0]),
            "seconds_per_video": way.seconds,
            "values": way.values,
        }
        for way in tried
    ]
    sampling = asdict(tried[found["chosen"]].sampling)
    said = {"schema": _SCHEMA, "time": time.time(), "step": question["step"], "sampling": sampling, **found}
    storage.write_json_atomic(
        str(output.sampling_choice), {**said, "question": question, "prompts": prompts, "ways": ways}
    )


def _told(tried: Sequence[Tried], chosen: int, measure: Measure) -> str:
    """The answer in a line for people, with the candidate that is recommended, or else the best that is not."""
    shown = chosen or max(range(1, len(tried)), key=lambda number: tried[number].mean)
    configured, way = tried[0], tried[shown]
    changes = ", ".join(
        f"{key} {value}" for key, value in vars(way.sampling).items() if value != getattr(configured.sampling, key)
    )
    low, high = way.gain(configured) or (0.0, 0.0)
    figures = f"{measure} {way.mean:.3f}, {way.mean - configured.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    place = f"against {configured.mean:.3f} as configured, on {len(way.values)} held-out prompts"
    if chosen:
        return f"sampling_choice: the model's folder recommends {changes} ({figures} {place})"
    return f"sampling_choice: what the config recommends stays; the best candidate was {changes} ({figures} {place})"


@dataclass(frozen=True, kw_only=True)
class Rated:
    """Videos that a task drew in one way."""

    way: int
    prompts: tuple[int, ...]  # their numbers
    values: tuple[float, ...]
    seconds: float  # of all together


def _try_all(
    run: PreparedRun, stored: StoredCheckpoint, prompts: Sequence[str], measure: Measure, progress: VideoProgress
) -> list[Tried]:
    """Every way, by tasks side by side that have the prompts by turns."""
    config = run.config
    resources = worker_resources(config)
    if lack := lacking([resources]):
        raise JobError(f"to draw videos needs {lack}")
    numbered = list(enumerate(prompts))
    tasks = min(config.num_workers, -(-len(prompts) // _BATCH))
    task: Any = ray.remote(try_ways)
    task = task.options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0.0), max_retries=0, num_returns="streaming"
    )
    threads = worker_threads(config)
    waiting = [task.remote(run, stored, numbered[first::tasks], measure, threads) for first in range(tasks)]
    assert config.sampling_choice is not None
    ways = config.sampling_choice.ways(config.recommended_sampling)
    values, seconds = np.full((len(ways), len(prompts)), np.nan), np.zeros(len(ways))
    try:
        while waiting:
            ready: list[Any] = ray.wait(waiting, timeout=_SILENCE)[0]
            if not ready:
                raise JobError(f"no video came for {_SILENCE / 60:.0f} minutes")
            reference = next(ready[0], None)
            if reference is None:
                waiting.remove(ready[0])
                continue
            rated: Rated = ray.get(reference)
            values[rated.way, list(rated.prompts)] = rated.values
            seconds[rated.way] += rated.seconds
            progress.advance(len(rated.prompts))
    finally:
        _give_up(waiting)
    if not np.isfinite(values).all():
        raise JobError(f"{measure} is no number for some videos")
    return [
        Tried(sampling=way, values=tuple(values[number].tolist()), seconds=float(seconds[number]) / len(prompts))
        for number, way in enumerate(ways)
    ]


def _give_up(streams: list[Any]) -> None:
    """End tasks, and take what they raised: Ray logs a traceback of every error that nobody asks for."""
    for stream in streams:
        ray.cancel(stream, force=True)
    ready: list[Any]
    while streams and (ready := ray.wait(streams, timeout=_CANCEL_SECONDS)[0]):
        reference = next(ready[0], None)
        if reference is None:
            streams.remove(ready[0])
        else:
            with suppress(Exception):
                ray.get(reference)


def try_ways(
    run: PreparedRun, stored: StoredCheckpoint, prompts: Sequence[tuple[int, str]], measure: Measure, threads: int
) -> Iterator[Rated]:
    """Draw a video of each of the numbered prompts in every way, batch by batch; a prompt has one seed in all ways."""
    trial = run.config.sampling_choice
    assert trial is not None
    ways = [dict(vars(way)) for way in trial.ways(run.config.recommended_sampling)]
    device: Literal["cpu", "cuda"] = "cuda" if run.config.resources.device == "gpu" else "cpu"
    torch.set_num_threads(threads)
    model, rate = load_model(run, stored, device), _rater(run.config, measure, device)
    model.generate(prompts[0][1], **ways[0])  # the first video of a process takes longer
    for first in range(0, len(prompts), _BATCH):
        numbers, texts = zip(*prompts[first : first + _BATCH], strict=True)
        for way, sampling in enumerate(ways):
            began = time.perf_counter()
            videos = model.generate(texts, seed=[trial.seed + number for number in numbers], **sampling)
            seconds = time.perf_counter() - began
            yield Rated(way=way, prompts=numbers, values=tuple(rate(texts, videos)), seconds=seconds)


def _rater(
    config: TrainConfig, measure: Measure, device: Literal["cpu", "cuda"]
) -> Callable[[Sequence[str], Sequence[NDArray[np.uint8]]], list[float]]:
    """What gives each video of some prompts its value."""
    if measure == "judge_strict":
        return judge_strictly
    assert config.samples.clip is not None
    clip = load_open_clip(replace(config.samples.clip, device=device), "samples.clip.weights")
    return lambda prompts, videos: clip_similarities(prompts, videos, clip)


def judge_strictly(prompts: Sequence[str], videos: Sequence[NDArray[np.uint8]]) -> list[float]:
    """1 of a video that shows all that its prompt, a caption of the corpus, asks for; else 0."""
    asked = [reading.strict() if (reading := asked_for(prompt)) else None for prompt in prompts]
    return [float(judge_video(video).strict() == wanted) for video, wanted in zip(videos, asked, strict=True)]
