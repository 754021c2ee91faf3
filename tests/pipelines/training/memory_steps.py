"""Run by two processes: what a step takes of memory, beside what the plan says (test_estimate.py).

Memory is that of torch's allocator on the CPU: every allocation and release since the engine began to be built, summed
in order; the highest sum is the peak. Another process' or Python's memory is not in it.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lumos.batch import pack
from lumos.config import MaskConfig
from lumos.flops import count_parameters
from lumos.layout import build_sequence
from lumos.losses import LossModule
from lumos.masking import sample_masked_positions
from lumos.vocabulary import Vocabulary
from pipelines.benchmarks.layers import allocations
from pipelines.training.config import ModelShape, ResourceConfig, TrainConfig
from pipelines.training.device_memory import Pass, worker_memory
from pipelines.training.engine import make_engine, prepare_process
from pipelines.training.estimate import setup_of
from pipelines.training.initialize import build_decoder
from pipelines.training.step import StepBatch, TrainStep
from tests.pipelines.training.runs import tiny_config

CPU = torch.device("cpu")
VOCABULARY = Vocabulary.compact(512, 4096)
SHAPE = ModelShape(
    hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=32, max_seq_len=4096
)
# name: DeepSpeed stage, device whose precision is used, changes of the model, latent shape
CASES = {
    "float32 zero1": (1, "cpu", {}, (7, 16, 16)),
    "bf16 zero2 full": (2, "gpu", {"checkpoint_activations": True, "num_layers": 12}, (7, 16, 24)),
    "bf16 zero1 grouped": (1, "gpu", {"hidden_size": 384, "num_heads": 12, "num_kv_heads": 4}, (5, 16, 16)),
    "bf16 zero3": (3, "gpu", {"checkpoint_activations": True}, (7, 16, 24)),
}
_ALIVE: list[TrainStep] = []  # what one case releases would be counted in the next


def config_of(folder: Path, case: str) -> tuple[TrainConfig, tuple[int, int, int]]:
    stage, device, changes, shape = CASES[case]
    file = folder / f"zero{stage}-{dist.get_rank()}.json"
    zero = {"stage": stage, "reduce_bucket_size": 2_000_000, "overlap_comm": False}
    zero |= {"stage3_max_live_parameters": 4_000_000, "stage3_param_persistence_threshold": 0} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = replace(
        tiny_config(folder, folder, global_batch=2),
        model=replace(SHAPE, **changes), deepspeed=str(file), precision="fp32" if device == "cpu" else "bf16",
        resources=ResourceConfig(device=device),
    )  # fmt: skip
    return config, shape


def measure(folder: Path, case: str) -> dict[str, float]:
    config, shape = config_of(folder, case)
    model = config.model.resolve(VOCABULARY.vocab_size, VOCABULARY.visual_start)
    setup = setup_of(config)

    def build() -> None:
        decoder = build_decoder(config, model, VOCABULARY, device=CPU)
        decoder.recompute = setup.recompute
        _ALIVE.append(TrainStep(make_engine(LossModule(decoder, VOCABULARY), config), VOCABULARY, device=CPU))

    held = allocations(build)[-1]
    ids, layout = build_sequence(VOCABULARY, [1] * 20, np.zeros(shape, dtype=np.int64), fps=12.0)
    masked = sample_masked_positions(layout, MaskConfig(), torch.Generator().manual_seed(0))
    one = pack(ids, masked, (layout,), VOCABULARY)
    batch, peak = StepBatch(0, 0, (one,), shape, 0, 2, 0, 0), 0
    for _ in range(2):  # the first makes the optimizer's state, the second is as all that follow
        sizes = allocations(lambda: _ALIVE[-1](batch, lr=1e-3, data_wait=0.0))
        peak, held = held + max(sizes), held + sizes[-1]
    counts = count_parameters(model, visual_classes=VOCABULARY.codebook_size)
    planned = worker_memory(model, counts, setup, Pass(len(one.ids), len(one.loss_positions)))
    return {"measured": peak, "planned": planned.peak, "lasting": held, **planned.device}


def main(folder: Path, cases: list[str]) -> None:
    dist.init_process_group("gloo")
    prepare_process(CPU, threads=1)
    figures = {case: measure(folder, case) for case in cases or CASES}
    if dist.get_rank() == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
