"""What a training step takes on a GPU: tokens per second, both MFUs, memory. Written without one at hand, never run.

What is to be expected of an H100 (989 TFLOP/s in bf16) if the aim is met, a mask-honest MFU of 45 %: one clip of 7
latent frames a pass, 80 % masked, parameters in bf16. Memory is of parameters, gradients and activations, without an
optimizer.

    preset    tokens   TFLOP, exact       recompute    tokens/s at the aim
    1b-256p   12,860   120                none         47,700
    1b-384p   28,652   369                selective    34,500
    3b-256p   12,860   327                selective    17,500
    3b-384p   28,652   995                full         12,800

To be measured, and the table replaced: backends sdpa, fused_flash and fused_cudnn, each with and without --compile.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lumos.attention import Backend
from lumos.config import Recompute
from lumos.flops import Workload, dense_flops, exact_flops
from pipelines.benchmarks.clips import (
    PRESETS,
    VOCABULARY,
    masked_tokens,
    new_module,
    step,
    timed,
    training_batch,
    whole_clips,
)
from pipelines.benchmarks.machine import describe_machine
from pipelines.training.accelerators import find_accelerator

_WARM_UP = 3


def run_cuda_train_benchmark(
    preset: str,
    repeats: int,
    say: Callable[[str], None],
    *,
    rows: int = 1,
    recompute: Recompute = "none",
    backend: Backend = "auto",
    compiled: bool = False,
) -> dict[str, Any]:
    """Forward and backward of so many clips, in bf16.

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
    work = Workload.of(batch.layouts, visual_predictions=masked_tokens(batch))
    batch = batch.to(torch.device("cuda"))
    for _ in range(_WARM_UP):
        step(module, batch)
    torch.cuda.reset_peak_memory_stats()
    samples = [timed(partial(step, module, batch)) for _ in range(repeats)]
    seconds, device = statistics.median(samples), torch.cuda.get_device_name()
    accelerator = find_accelerator(device)
    flops = {
        "exact": exact_flops(config, work, visual_classes=VOCABULARY.codebook_size).model,
        "dense": dense_flops(config, work).model,
    }
    mfu = {name: value / seconds / accelerator.flops if accelerator else None for name, value in flops.items()}
    found = {
        "tokens_per_s": work.tokens / seconds,
        **{f"mfu_{name}": value for name, value in mfu.items()},
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    for name, value in found.items():
        say(f"{name} {value}")
    options = {"rows": rows, "recompute": recompute, "backend": backend, "compiled": compiled}
    return {
        "schema": 1,
        **found,
        "step_s": samples,
        "tokens": work.tokens,
        "flops": flops,
        "config": {"preset": preset, "repeats": repeats, **options},
        "device": device,
        "machine": describe_machine(),
    }
