"""What a training step takes of time and memory: on a CPU told in products of two matrices taken in turns with it."""

import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumos.attention import Backend
from lumos.batch import PackedBatch
from lumos.config import Recompute
from lumos.losses import LossModule
from lumos.masking import apply_mask
from pipelines.benchmarks.clips import (
    MASK_RATIO,
    PRESETS,
    VOCABULARY,
    arithmetic,
    new_module,
    step,
    timed,
    training_batch,
    whole_clips,
)
from pipelines.benchmarks.machine import describe_machine, product_ms
from pipelines.benchmarks.processes import peak_rss_gb
from pipelines.memory import give_back_large_buffers
from pipelines.training.accelerators import find_accelerator

_THREADS = 2
_MEMORY_STEPS = 3  # the second one meets the gradients' memory of the first
_MEMORY_RUNS = {
    "fp32": {"precision": "fp32", "recompute": "none"},
    "bf16": {"precision": "bf16", "recompute": "none"},
    "fp32_ckpt": {"precision": "fp32", "recompute": "full"},
}
_BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 3e-2)}  # of loss and gradients against the dense reference
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
_WARM_UP = 3  # steps on a GPU


def run_cpu_train_benchmark(preset: str, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Time and memory of forward and backward of one clip on 2 threads; ``say`` is called with a line about each.

    Returns:
        JSON-able: ``matmul2048_s``, ``fp32_step_s``, ``bf16_step_s`` (medians), ``fp32_peak_rss_gb``,
        ``bf16_peak_rss_gb``, ``fp32_ckpt_peak_rss_gb`` (1e9 bytes), and all samples, under ``raw``.
    """
    torch.set_num_threads(_THREADS)
    before = product_ms()
    config, shape = PRESETS[preset].model(), PRESETS[preset].shape
    memory = {
        name: peak_rss_gb("pipelines.benchmarks.train", "memory_steps", {"preset": preset, **run})
        for name, run in _MEMORY_RUNS.items()
    }  # while this process is small
    for name, peak in memory.items():
        say(f"{name}: peak of memory {peak:.2f} GB")
    whole = whole_clips(shape)
    batch = training_batch(whole)
    modules = {name: new_module(config, autocast=dtype) for name, dtype in _AUTOCAST.items()}
    check = check_against_dense(modules, whole)
    say(f"checked against the dense mask and whole logits: {check}")
    samples = in_turns({name: partial(step, module, batch) for name, module in modules.items()}, repeats)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name in modules:
        spread = f"{min(samples[name]):.2f} to {max(samples[name]):.2f} s"
        products = medians[name] / medians["matmul2048"]
        say(
            f"{name}: {medians[name]:.2f} s a step ({spread}), {products:.1f} products of {medians['matmul2048']:.4f} s"
        )
    counted = arithmetic(config, batch)
    return {
        "schema": 1,
        "matmul2048_s": medians["matmul2048"],
        **{f"{name}_step_s": medians[name] for name in modules},
        **{f"{name}_peak_rss_gb": peak for name, peak in memory.items()},
        "products": {name: medians[name] / medians["matmul2048"] for name in modules},
        "raw": {f"{name}_s": values for name, values in samples.items()},
        "check": check,
        "tokens": {
            "clip": len(whole.ids),
            "trained_on": len(batch.ids),  # without what follows the last frame, as training cuts it off
            "predicted": counted["predicted"],
        },
        "flops": counted["flops"],
        "config": {"preset": preset, "shape": shape, "mask_ratio": MASK_RATIO, "repeats": repeats, **asdict(config)},
        "threads": _THREADS,
        "load": os.getloadavg(),
        "machine": describe_machine(),
        "product_ms": {"before": before, "after": product_ms()},
    }


def in_turns(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Samples of each, none left out, a product of two matrices before each of them."""
    matrix = torch.ones(2048, 2048)
    samples: dict[str, list[float]] = {"matmul2048": [], **{name: [] for name in works}}
    for _ in range(repeats):
        for name, work in works.items():
            samples["matmul2048"].append(timed(lambda: matrix @ matrix))
            samples[name].append(timed(work))
    return samples


def check_against_dense(modules: dict[str, LossModule], whole: PackedBatch) -> dict[str, dict[str, float]]:
    """Loss and gradients against those of a dense mask and whole logits, in float32, of all tokens.

    Returns:
        Of each module, ``loss``: difference, and ``gradient``: the length of the difference of all gradients to that of
        the reference's.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    expected, reference = _dense_gradients(modules["fp32"], whole)
    length = _length(reference.values())
    found = {}
    for name, module in modules.items():
        loss = step(module, training_batch(whole))
        difference = _length(gradient - reference[key] for key, gradient in _gradients(module).items())
        module.zero_grad(set_to_none=True)
        found[name] = {"loss": abs(loss - expected), "gradient": difference / length}
        loss_bound, gradient_bound = _BOUNDS[name]
        if not (found[name]["loss"] <= loss_bound and found[name]["gradient"] <= gradient_bound):
            raise RuntimeError(f"{name} is off the dense reference: {found[name]}")
    return found


def _gradients(module: LossModule) -> dict[str, Tensor]:
    return {key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None}


def _length(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def _dense_gradients(module: LossModule, whole: PackedBatch) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients by the dense mask and whole logits."""
    module.zero_grad(set_to_none=True)
    decoder, backend = module.decoder, module.decoder.attention_backend
    decoder.attention_backend = "dense"
    hidden = decoder(apply_mask(whole.ids, whole.masked_positions, VOCABULARY), whole.layouts)
    decoder.attention_backend = backend
    selected = whole.masked_positions & (whole.ids >= VOCABULARY.visual_start)
    logits = hidden[selected] @ decoder.lm_head.visual_rows(VOCABULARY).T
    loss = F.cross_entropy(logits, whole.ids[selected] - VOCABULARY.visual_start)
    loss.backward()
    gradients = _gradients(module)
    module.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def memory_steps(preset: str, precision: str, recompute: Recompute) -> None:
    """What that process does."""
    torch.set_num_threads(_THREADS)
    if recompute != "none":  # as a worker does
        give_back_large_buffers()
    module = new_module(PRESETS[preset].model(), autocast=_AUTOCAST[precision])
    module.decoder.recompute = recompute
    batch = training_batch(whole_clips(PRESETS[preset].shape))
    for _ in range(_MEMORY_STEPS):
        step(module, batch)


def run_cuda_train_benchmark(
    preset: str,
    repeats: int,
    say: Callable[[str], None],
    *,
    rows: int,
    recompute: Recompute,
    backend: Backend,
    compiled: bool,
) -> dict[str, Any]:
    """Forward and backward of so many clips on a GPU, in bf16. Written without one at hand, never run.

    What is to be expected of an H100 (989 TFLOP/s in bf16) if the aim is met, a mask-honest MFU of 45 %: one clip of 7
    latent frames a pass, 80 % masked, parameters in bf16. Memory is of parameters, gradients and activations, without
    an optimizer.

        preset    tokens   TFLOP, exact       recompute    tokens/s at the aim
        1b-256p   12,860   120                none         47,700
        1b-384p   28,652   369                selective    34,500
        3b-256p   12,860   327                selective    17,500
        3b-384p   28,652   995                full         12,800

    To be measured, and the table replaced: backends sdpa, fused_flash and fused_cudnn, each with and without --compile.

    Returns:
        JSON-able: ``step_s`` (samples), ``tokens_per_s``, ``mfu_exact``, ``mfu_dense`` (None for a GPU whose
        peak is not known), ``peak_memory_gb``, and the configuration.
    """
    config, shape = PRESETS[preset].model(), PRESETS[preset].shape
    module = new_module(config).to("cuda", torch.bfloat16)
    module.decoder.recompute, module.decoder.attention_backend = recompute, backend
    if compiled:
        module.decoder.compile_blocks()
    batch = training_batch(whole_clips(shape, rows))
    flops = arithmetic(config, batch)["flops"]
    batch = batch.to(torch.device("cuda"))
    for _ in range(_WARM_UP):
        step(module, batch)
    torch.cuda.reset_peak_memory_stats()
    samples = [timed(partial(step, module, batch)) for _ in range(repeats)]
    seconds, device = statistics.median(samples), torch.cuda.get_device_name()
    accelerator = find_accelerator(device)
    found: dict[str, float | None] = {"tokens_per_s": len(batch.ids) / seconds}
    for name, value in flops.items():
        found[f"mfu_{name}"] = value / seconds / accelerator.flops("bf16") if accelerator else None
    found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    for name, value in found.items():
        say(f"{name} {value}")
    options = {"rows": rows, "recompute": recompute, "backend": backend, "compiled": compiled}
    return {
        "schema": 1,
        **found,
        "step_s": samples,
        "tokens": len(batch.ids),
        "flops": flops,
        "config": {"preset": preset, "repeats": repeats, **options},
        "device": device,
        "machine": describe_machine(),
    }
