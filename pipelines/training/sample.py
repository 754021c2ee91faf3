"""Videos of some prompts, drawn by a task beside the training from its checkpoints.

Ray Train's own validation beside a training (``report(validation=...)``) would queue one task for every report, hold
the checkpoints of all that wait, and make the end wait for them; here a task that is slow has later ones left out, and
no error of one is more than a warning. Videos come back as values, so nodes share no disk.

A set lies in ``samples/step-XXXXXXXX`` of the output: ``NN.mp4`` for each prompt and ``samples.json``, written last.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import av
import numpy as np
import ray
import torch
from numpy.typing import NDArray

import lumos
from pipelines.cluster import lacking
from pipelines.data.models.open_clip import OpenClip, load_open_clip
from pipelines.evaluation.compare.runs import SAMPLES_FILE
from pipelines.evaluation.judge import asked_for, judge_video, score
from pipelines.media import encode_video
from pipelines.storage.cache import local_path
from pipelines.training.checkpoints import StoredCheckpoint
from pipelines.training.config import SamplesConfig
from pipelines.training.export import export
from pipelines.training.prepare import PreparedRun
from pipelines.training.rows import open_rows
from pipelines.training.validate import HeldOutRow, choose_rows

_STRIP_FRAMES = 8  # of a video, side by side in its filmstrip
_CLIP_FRAMES = 4  # of a video that CLIP sees, evenly spaced
_LAST_SECONDS = 900.0  # that the end of a training waits for the last set


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """What a task hands back."""

    prompts: tuple[str, ...]
    videos: tuple[bytes, ...]  # mp4, one for each prompt
    metrics: dict[str, float]


def choose_prompts(run: PreparedRun) -> tuple[str, ...]:
    """The prompts of every set: those of the config, or the first captions of held-out rows."""
    config = run.config.samples
    return config.prompts or tuple(islice(first_captions(run, choose_rows(run)), config.count))


def first_captions(run: PreparedRun, rows: Iterable[HeldOutRow]) -> Iterator[str]:
    """Of each of the rows that has any."""
    readers = open_rows(run, ["captions"])
    for chosen in rows:
        record = readers[chosen.dataset].row(chosen.bucket, chosen.row)
        if record["captions"]:
            yield record["captions"][0]["text"]


def draw_samples(run: PreparedRun, stored: StoredCheckpoint, prompts: Sequence[str]) -> SampleSet:
    """Draw a video of each prompt with the model of a checkpoint, and measure them."""
    config = run.config.samples
    device: Literal["cpu", "cuda"] = "cuda" if config.num_gpus else "cpu"
    torch.set_num_threads(max(1, round(config.num_cpus)))
    model = load_model(run, stored, device)
    videos = model.generate(list(prompts), seed=[config.seed + index for index in range(len(prompts))])
    fps = model.encoder.size(width=None, height=None, num_frames=None, fps=None).fps
    metrics = judge_samples(prompts, videos)
    if config.clip is not None:
        clip = load_open_clip(replace(config.clip, device=device), "samples.clip.weights")
        metrics["clip_similarity"] = fmean(clip_similarities(prompts, videos, clip))
    return SampleSet(
        prompts=tuple(prompts), videos=tuple(encode_video(frames, fps) for frames in videos), metrics=metrics
    )


def load_model(run: PreparedRun, stored: StoredCheckpoint, device: Literal["cpu", "cuda"]) -> lumos.Model:
    """The model of a checkpoint, in float32 on a CPU and in bf16 on a GPU."""
    on_gpu, scratch = device == "cuda", run.config.checkpoint.scratch
    with tempfile.TemporaryDirectory(prefix="lumos-samples-") as folder:
        export(stored, Path(folder) / "model", dtype="bf16" if on_gpu else "fp32", scratch=scratch)
        named = run.config.data.tokenizer.path if run.config.data.tokenizer else None
        tokenizer = local_path(named) if named else None
        dtype = torch.bfloat16 if on_gpu else torch.float32
        return lumos.load(Path(folder) / "model", device=device, dtype=dtype, tokenizer=tokenizer)


def judge_samples(prompts: Sequence[str], videos: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Shares of videos that show what the demo's prompts ask for; none, if any prompt is of another kind."""
    asked = [reading for prompt in prompts if (reading := asked_for(prompt)) is not None]
    if not videos or len(asked) < len(prompts):
        return {}
    return {f"judge_{name}": share for name, share in score([judge_video(v) for v in videos], asked).accuracy.items()}


@torch.inference_mode()
def clip_similarities(prompts: Sequence[str], videos: Sequence[NDArray[np.uint8]], clip: OpenClip) -> list[float]:
    """Of each video, the mean cosine between the features of its prompt and those of its frames."""
    texts = clip.model.encode_text(clip.tokenizer(list(prompts)).to(clip.device), normalize=True)
    cosines = []
    for text, frames in zip(texts, videos, strict=True):
        some = frames[np.linspace(0, len(frames) - 1, _CLIP_FRAMES).round().astype(int)]
        images = clip.model.encode_image(clip.images(list(some)), normalize=True)
        cosines.append(float((images @ text).mean()))
    return cosines


def read_samples(folder: Path) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
    """What was written of a set, and the filmstrip [H, W, 3] of each of its videos."""
    said = json.loads((folder / SAMPLES_FILE).read_text(encoding="utf-8"))
    return said, [_filmstrip(folder / name) for name in said["files"]]


def _filmstrip(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    some = np.linspace(0, len(frames) - 1, min(_STRIP_FRAMES, len(frames))).round().astype(int)
    return np.concatenate([frames[index] for index in some], axis=1)


class Sampler:
    """Starts one task after another, and writes down what it hands back; on the driver."""

    def __init__(self, run: PreparedRun, folder: Path, *, say: Callable[[str], None]) -> None:
        """Nothing is done until a checkpoint is offered.

        Args:
            run: what is trained.
            folder: where sets are written.
            say: shows a line to the user.
        """
        self.run, self.folder, self.say = run, folder, say
        self._prompts: tuple[str, ...] | None = None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._task: Any = None

    def due(self, step: int) -> bool:
        """Whether the checkpoint of a step is to be drawn from."""
        config: SamplesConfig = self.run.config.samples
        return bool(config.every) and (step % config.every == 0 or step == self.run.config.steps)

    def offer(self, step: int, find: Callable[[int], StoredCheckpoint | None]) -> None:
        """Begin a set, unless one is being drawn; ``find`` gives the checkpoint of a step."""
        if self._thread is not None and self._thread.is_alive():
            self.say(f"no samples of step {step}: those of step {self._step} are still being drawn")
            return
        self._step = step
        self._thread = threading.Thread(target=self._draw, args=(step, find), name="sampler", daemon=True)
        self._thread.start()

    def close(self, *, finished: bool) -> None:
        """Wait for the set that is being drawn, if the training is finished; else give it up."""
        if self._thread is None:
            return
        self._thread.join(_LAST_SECONDS if finished else 0)
        if self._thread.is_alive() and self._task is not None:
            ray.cancel(self._task, force=True)

    def _draw(self, step: int, find: Callable[[int], StoredCheckpoint | None]) -> None:
        config, began = self.run.config.samples, time.time()
        try:
            if self._prompts is None:
                self._prompts = choose_prompts(self.run)
            checkpoint = find(step)
            if checkpoint is None or not self._prompts:
                what = "there is no checkpoint of it" if self._prompts else "no held-out row has a caption"
                self.say(f"no samples of step {step}: {what}")
                return
            lack = lacking([{"CPU": config.num_cpus, "GPU": config.num_gpus}])
            if lack and not self.run.config.cluster.autoscaling:  # it would be waited for at the end, in vain
                self.say(f"no samples of step {step}: samples.num_cpus and samples.num_gpus need {lack}")
                return
            task: Any = ray.remote(draw_samples)
            task = task.options(num_cpus=config.num_cpus, num_gpus=config.num_gpus, max_retries=0)
            self._task = task.remote(self.run, checkpoint, self._prompts)
            write_samples(self.folder, step, ray.get(self._task), time=began)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no reason to end a training
            cause = str(error).strip() or "no message"
            self.say(f"no samples of step {step}: {type(error).__name__}: {cause.splitlines()[-1]}")


def write_samples(folder: Path, step: int, found: SampleSet, *, time: float) -> Path:
    """Write down a set; it counts once its ``samples.json`` is there."""
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    files = [f"{index:02d}.mp4" for index in range(len(found.videos))]
    for name, video in zip(files, found.videos, strict=True):
        (target / name).write_bytes(video)
    said = {"step": step, "time": time, "prompts": found.prompts, "files": files, "metrics": found.metrics}
    partial = target / f".{SAMPLES_FILE}"
    partial.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    partial.rename(target / SAMPLES_FILE)
    return target
