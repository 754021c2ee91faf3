"""What attention and the loss take alone: the functions that a training step calls, against plain forms of them."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lumos.attention import Backend, attend
from lumos.cross_entropy import cross_entropy
from lumos.layout import SequenceLayout
from pipelines.benchmarks.clips import MASK_RATIO, PRESETS, VOCABULARY, timed, training_batch, whole_clips
from pipelines.benchmarks.machine import describe_machine, product_ms

_THREADS = 2
_SHAPES = ((7, 16, 24), (7, 32, 56))


def run_attention_benchmark(
    preset: str, repeats: int, say: Callable[[str], None], *, device: str, backend: Backend
) -> dict[str, Any]:
    """Forward and backward of attention as a step calls it, and with a dense mask, in turns, at two sizes of clip.

    Returns:
        JSON-able: for each size ``speedup`` (medians), ``difference`` of output and gradients, ``memory_mb`` of both by
        number of frames, all samples.

    Raises:
        RuntimeError: if gradients differ from those of the dense mask by more than 1e-5 of the largest.
    """
    where = torch.device(device)
    torch.set_num_threads(_THREADS)
    before, config, found = product_ms(), PRESETS[preset].model(), {}
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    for shape in _SHAPES:
        layout = training_batch(whole_clips(shape)).layouts[0]
        inputs = _inputs(layout.length, heads, where)
        ours, dense = (_both_passes(inputs, layout, each) for each in (backend, "dense"))
        tolerance = 1e-5 if device == "cpu" else 2e-2
        difference = _difference("attention", ours, dense, order=math.inf, tolerance=tolerance)
        seconds: dict[str, list[float]] = {"ours_s": [], "dense_s": []}
        for _ in range(repeats):
            seconds["ours_s"].append(timed(partial(_both_passes, inputs, layout, backend)))
            seconds["dense_s"].append(timed(partial(_both_passes, inputs, layout, "dense")))
        speedup = statistics.median(seconds["dense_s"]) / statistics.median(seconds["ours_s"])
        memory = {frames: _memory_mb(frames, shape, heads, where, backend) for frames in (1, 2, 4, 7)}
        name = "x".join(str(size) for size in shape)
        found[name] = {
            "tokens": layout.length,
            "speedup": speedup,
            "difference": difference,
            "memory_mb": memory,
            **seconds,
        }
        say(f"{name}: {speedup:.2f} times as fast as the dense mask, {difference:.1e} from it; {memory} MB by frames")
    return {"schema": 1, **found, "backend": backend, **_about(preset, repeats, before)}


def _about(preset: str, repeats: int, before: float) -> dict[str, Any]:
    return {
        "config": {"preset": preset, "repeats": repeats, "mask_ratio": MASK_RATIO},
        "threads": _THREADS,
        "machine": describe_machine(),
        "product_ms": {"before": before, "after": product_ms()},
    }


def _inputs(tokens: int, heads: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    num_heads, num_kv_heads, head_dim = heads
    shapes = [(tokens, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _both_passes(inputs: list[Tensor], layout: SequenceLayout, backend: Backend) -> list[Tensor]:
    """Output and gradients."""
    query, key, value = inputs
    out = attend(query, key, value, [layout], backend=backend)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
    return [out.detach(), *gradients]


def _difference(what: str, ours: list[Tensor], plain: list[Tensor], *, order: float, tolerance: float) -> float:
    """The largest of the norms of differences by those of the plain form's results; an error beyond the tolerance."""
    norm = partial(torch.linalg.vector_norm, ord=order)
    found = [float(norm(a - b) / norm(b)) for a, b in zip(ours, plain, strict=True)]
    if not all(each <= tolerance for each in found):
        raise RuntimeError(f"{what} is {max(found):.1e} off its plain form")
    return max(found)


def _memory_mb(
    frames: int, shape: tuple[int, int, int], heads: tuple[int, int, int], device: torch.device, backend: Backend
) -> float:
    """MB by which memory grows at most in both passes of a clip of so many frames."""
    layout = training_batch(whole_clips((frames, *shape[1:]))).layouts[0]
    inputs = _inputs(layout.length, heads, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        _both_passes(inputs, layout, backend)
        return round((torch.cuda.max_memory_allocated() - begin) / 1e6, 1)
    return round(max(allocations(lambda: _both_passes(inputs, layout, backend))) / 1e6, 1)


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes that torch has allocated on the CPU since a call began, after each of its allocations and releases.

    A process' size would not do: what was released before is used again, and not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def run_loss_benchmark(preset: str, repeats: int, say: Callable[[str], None], *, device: str) -> dict[str, Any]:
    """Forward and backward of head and loss as a step calls them, against whole logits, in turns.

    Returns:
        JSON-able: by precision ``ours_s`` and ``whole_logits_s`` (samples), ``products``, and the products' time.

    Raises:
        RuntimeError: if loss or gradients differ from those of whole logits by more than rounding.
    """
    where = torch.device(device)
    torch.set_num_threads(_THREADS)
    before, config = product_ms(), PRESETS[preset].model()
    frames, rows, cols = PRESETS[preset].shape
    generator, count = torch.Generator().manual_seed(0), round(frames * rows * cols * MASK_RATIO)
    hidden = torch.randn(count, config.hidden_size, generator=generator).to(where).requires_grad_()
    weight = 0.02 * torch.randn(VOCABULARY.codebook_size, config.hidden_size, generator=generator)
    weight = weight.to(where).requires_grad_()
    targets = torch.randint(0, VOCABULARY.codebook_size, (count,), generator=generator).to(where)
    matrix, products, found = torch.ones(2048, 2048), [], {}
    for name, enabled in (("fp32", False), ("bf16", True)):
        seconds: dict[str, list[float]] = {"ours_s": [], "whole_logits_s": []}
        autocast = partial(torch.autocast, where.type, torch.bfloat16, enabled=enabled)
        with autocast():
            ours, whole = _ours(hidden, weight, targets), _whole_logits(hidden, weight, targets)
        difference = _difference("the loss", ours, whole, order=2, tolerance=2e-2 if enabled else 2e-5)
        for _ in range(repeats):
            products.append(timed(lambda: matrix @ matrix))  # in float32
            with autocast():
                seconds["ours_s"].append(timed(lambda: _ours(hidden, weight, targets)))
                seconds["whole_logits_s"].append(timed(lambda: _whole_logits(hidden, weight, targets)))
        taken = {key: statistics.median(values) / statistics.median(products) for key, values in seconds.items()}
        found[name] = {**seconds, "products": taken, "difference": difference}
        said = ", ".join(f"{key.removesuffix('_s')} {value:.1f} products" for key, value in taken.items())
        say(f"{name}: {said}; {difference:.1e} apart")
    return {"schema": 1, "rows": count, **found, "matmul2048_s": products, **_about(preset, repeats, before)}


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    loss = cross_entropy(hidden, weight, targets).total / len(targets)
    return _with_gradients(loss, hidden, weight)


def _whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    return _with_gradients(F.cross_entropy((hidden @ weight.T).float(), targets), hidden, weight)


def _with_gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, (hidden, weight))
    if loss.is_cuda:
        torch.cuda.synchronize()
    return [loss.detach(), *gradients]
