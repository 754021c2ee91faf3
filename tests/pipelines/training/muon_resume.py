"""Run by two processes: Muon under ZeRO-1, once without and once with a stop in the middle (test_engine.py)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lumos.batch import PackedBatch
from lumos.config import MaskConfig
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.losses import LossModule
from lumos.masking import sample_masked_positions
from lumos.vocabulary import Vocabulary
from pipelines.training.config import OptimizerConfig, TrainConfig
from pipelines.training.engine import Engine, make_engine, prepare_process
from pipelines.training.engine_files import EngineFiles, load_engine, save_engine
from pipelines.training.step import StepBatch, TrainStep
from tests.pipelines.training.runs import tiny_config

VOCABULARY = Vocabulary.compact(32, 16)
LR = 0.01


def new_engine(config: TrainConfig) -> Engine:
    model = Decoder(config.model.resolve(VOCABULARY.vocab_size))
    model.init_weights(torch.Generator().manual_seed(0))
    return make_engine(LossModule(model, VOCABULARY, 0.0), config)


def batches(first: int, stop: int) -> Iterator[StepBatch]:
    for step in range(first, stop):
        micro_batches = []
        for micro in range(2):
            seed = (step * 2 + micro) * 2 + dist.get_rank()
            codes = np.random.default_rng(seed).integers(0, 16, (2, 4, 4)) % (seed % 4 + 2)
            ids, layout = build_sequence(VOCABULARY, [1, 2 + seed % 4], codes, fps=12.0)
            masked = sample_masked_positions(layout, MaskConfig(), torch.Generator().manual_seed(seed))
            micro_batches.append(PackedBatch(ids, masked, (layout,)))
        yield StepBatch(step, 0, tuple(micro_batches), (2, 4, 4), 0, 4, 0, 0)


def run(engine: Engine, first: int, stop: int) -> list[float]:
    step = TrainStep(engine, VOCABULARY, device=torch.device("cpu"))
    return [step(batch, lr=LR, data_wait=0.0).loss for batch in batches(first, stop)]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    prepare_process(torch.device("cpu"), threads=1)
    muon = OptimizerConfig(kind="muon", lr=LR, muon_lr=2 * LR, clip_norm=0.0, weight_decay=0.0)
    config = tiny_config(folder, folder, optimizer=muon, global_batch=4)

    whole = new_engine(config)
    key = "decoder.model.layers.0.self_attn.q_proj.weight"
    before = whole.module.get_parameter(key).detach().clone()
    losses = run(whole, 0, 1)
    update = (before - whole.module.get_parameter(key).detach()) / (2 * LR)
    values = torch.linalg.svdvals(update.float())
    # What makes it Muon: updates whose singular values are all about 1, as far as the gradient has rank.
    assert values[:16].min() > 0.5, values
    assert values.max() < 1.5, values
    losses += run(whole, 1, 8)
    assert losses[-1] < losses[0], losses

    begun = new_engine(config)
    parts = run(begun, 0, 4)
    save_engine(begun, folder)
    continued = new_engine(config)
    load_engine(continued, EngineFiles(folder / "engine"))
    parts += run(continued, 4, 8)
    assert parts == losses, (parts, losses)
    dist.destroy_process_group()
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(Path(sys.argv[1]))
