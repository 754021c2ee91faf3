"""What drawing a video takes of time and memory: on a CPU told in products of two matrices taken around it."""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from lumos.config import ModelConfig, SamplingConfig
from lumos.decoder import Decoder
from lumos.flops import Workload, exact_flops
from lumos.guidance import GenerationRequest
from lumos.layout import header_tokens, video_layout
from lumos.sampling import generate, num_remasked
from pipelines.benchmarks.clips import PRESETS, VOCABULARY, Preset, timed
from pipelines.benchmarks.machine import describe_machine, product_ms
from pipelines.benchmarks.processes import peak_rss_gb
from pipelines.training.accelerators import find_accelerator

_THREADS = 2
_FPS = 12.0
_PRODUCTS = 5  # before and after each batch, on a CPU
_PRODUCT_FLOPS = 2.0 * 2048**3
_PROMPT_TOKENS = 59


@dataclass(frozen=True, kw_only=True)
class GenerateBenchmark:
    """What is drawn, and how often. Weights are random: what a step costs does not depend on them."""

    preset: str = "cpu-156m"
    batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 3  # videos at the least of each size of batch
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_steps=10))


def run_generate_benchmark(config: GenerateBenchmark, say: Callable[[str], None]) -> dict[str, Any]:
    """Time and memory of videos of random weights, codes only; ``say`` is called with a line about each batch.

    On a CPU, on 2 threads, each batch stands between products of two 2048x2048 float32 matrices.

    Returns:
        JSON-able: ``video_s`` (median, batch of one, or the first size asked for), ``peak_rss_gb`` (1e9 bytes, of a
        process of its own that draws that batch alone; on a GPU ``peak_memory_gb``, of the device), ``matmul2048_s``
        (on a CPU), ``products`` (video_s in these), and for each size of batch seconds a video, frames per second and
        the share that the matrix products of the model would take at the machine's own rate.
    """
    cuda = config.device == "cuda"
    if not cuda:
        torch.set_num_threads(_THREADS)
    peak = None if cuda else _peak_of_own_process(config)  # while this process is small
    preset = PRESETS[config.preset]
    model = new_decoder(config)
    flops = sampling_flops(preset.model(), preset.shape, config.sampling)
    found: dict[str, Any] = {}
    for size in config.batches:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        around, samples = [], []
        for seed in range(max(1, -(-config.repeats // size)) + cuda):  # the first on a GPU warms up
            around += [] if cuda else _products()
            samples.append(timed(partial(draw, model, preset, config.sampling, size, seed)) / size)
            around += [] if cuda else _products()
        seconds = statistics.median(samples[cuda:])
        rate = _rate(config, around)
        entry: dict[str, Any] = {
            "video_s": seconds,
            "frames_per_s": (4 * preset.shape[0] - 3) / seconds,
            "share_of_products": flops / seconds / rate if rate else None,
            "samples_s": samples,
        }
        if cuda:
            entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        else:
            entry["matmul2048_s"] = statistics.median(around)
            entry["products"] = seconds / entry["matmul2048_s"]
        found[str(size)] = entry
        figures = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if isinstance(value, float))
        say(f"batch {size}: {figures}")
    first = found[str(config.batches[0])]
    if peak is not None:
        say(f"peak of memory {peak:.2f} GB, batch {config.batches[0]}")
    return {
        "schema": 1,
        "matmul2048_s": first.get("matmul2048_s"),
        "video_s": first["video_s"],
        "peak_rss_gb": peak,
        "peak_memory_gb": first.get("peak_memory_gb"),
        "products": first.get("products"),
        "batches": found,
        "flops_per_video": flops,
        "config": {**asdict(config), "shape": preset.shape, "model": asdict(preset.model())},
        "threads": None if cuda else _THREADS,
        "load": os.getloadavg(),
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def new_decoder(config: GenerateBenchmark) -> Decoder:
    """The preset's model with weights from a seed, made once, in its dtype and place."""
    with torch.device(config.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, config.dtype))
        try:
            model = Decoder(PRESETS[config.preset].model())
        finally:
            torch.set_default_dtype(default)
    model.init_weights(torch.Generator(config.device).manual_seed(0))
    if config.compiled:
        model.compile_blocks()
    return model.eval()


def draw(model: Decoder, preset: Preset, sampling: SamplingConfig, size: int, seed: int) -> list[np.ndarray]:
    """A batch of videos, of prompts of random words."""
    words = np.random.default_rng(seed)
    requests = [
        GenerationRequest(
            text_ids=words.integers(10_000, 60_000, _PROMPT_TOKENS).tolist(),
            shape=preset.shape,
            fps=_FPS,
            seed=seed * size + number,
            config=sampling,
        )
        for number in range(size)
    ]
    return generate(model, VOCABULARY, requests)


def sampling_flops(config: ModelConfig, shape: tuple[int, int, int], sampling: SamplingConfig) -> float:
    """FLOPs of the matrix products that the full sampler asks for, of one video: the floor of its time.

    Both branches, with every pass over a whole frame; the head where a code is still unknown.
    """
    rows, cols = shape[1:]
    slots, branches = rows * cols, 1 if sampling.guidance_scale == 1 else 2
    tokens = pairs = predictions = 0
    for drop_text in (False, True)[:branches]:
        header = len(
            header_tokens(VOCABULARY, [0] * _PROMPT_TOKENS, num_latents=shape[0], fps=_FPS, drop_text=drop_text)
        )
        tokens, pairs = tokens + header, pairs + header**2
        for frame in video_layout(header, shape).frames:
            last = frame.start + frame.length == video_layout(header, shape).length
            passes = sampling.num_steps + (not last)  # a finished frame is read once more, as history
            tokens += passes * frame.length
            pairs += passes * frame.length * frame.stop
    unknown = slots
    for step in range(sampling.num_steps):
        predictions += unknown * shape[0]
        unknown = num_remasked(slots, unknown, step, sampling.num_steps)
    work = Workload(tokens, pairs, pairs, predictions)
    return exact_flops(config, work, visual_classes=VOCABULARY.codebook_size).forward.total


def _rate(config: GenerateBenchmark, around: Sequence[float]) -> float | None:
    """FLOP/s of matrix products here: of those timed around a batch, or the peak of a known GPU."""
    if around:
        return _PRODUCT_FLOPS / statistics.median(around)
    accelerator = find_accelerator(torch.cuda.get_device_name())
    return accelerator.flops("bf16" if config.dtype == "bfloat16" else "fp32") if accelerator else None


def _products() -> list[float]:
    return [product_ms() / 1e3]


def _peak_of_own_process(config: GenerateBenchmark) -> float:
    return peak_rss_gb("pipelines.benchmarks.generate", "memory_steps", {"raw": asdict(config)})


def memory_steps(raw: dict[str, Any]) -> None:
    """What the process does whose memory is measured: make the model, draw a batch."""
    torch.set_num_threads(_THREADS)
    config = GenerateBenchmark(**raw | {"sampling": SamplingConfig(**raw["sampling"])})
    draw(new_decoder(config), PRESETS[config.preset], config.sampling, config.batches[0], 0)
