"""Run by two processes: what a validation computes, and that training is bitwise the same with and without it.

Under the ZeRO stage named (test_validate.py); under stage 3 with all tensors partitioned.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lumos.decoder import Decoder
from lumos.losses import LossModule
from pipelines.training.config import ValidationConfig
from pipelines.training.engine import make_engine, prepare_process
from pipelines.training.ingest import StepLoader, pack, unpack
from pipelines.training.prepare import PreparedRun, prepare
from pipelines.training.step import TrainStep
from pipelines.training.validate import Validator
from tests.pipelines.training.runs import tiny_config

CPU = torch.device("cpu")
STEPS = 6


def train(run: PreparedRun, *, every: int) -> tuple[list[float], list[dict[str, object]], dict[str, torch.Tensor]]:
    model = Decoder(run.model)
    model.init_weights(torch.Generator().manual_seed(0))
    module = LossModule(model, run.vocabulary, 0.0)
    engine = make_engine(module, run.config)
    step = TrainStep(engine, run.vocabulary, device=CPU)
    loader, validator = (
        StepLoader(run, dist.get_rank(), dist.get_world_size()),
        Validator(run, rank=dist.get_rank(), device=CPU),
    )
    losses, validations = [], []
    for index in range(STEPS):
        (batch,) = unpack(pack([loader.load(index)]))
        losses.append(step(batch, lr=3e-3, data_wait=0.0).loss)
        if every and (index + 1) % every == 0:
            validations.append(validator(engine))
            assert torch.get_num_threads() == 2
    return losses, validations, whole_weights(module.decoder)


def whole_weights(model: Decoder) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(weight).clone() for name, weight in model.named_parameters()}


def main(stage: str, dataset: Path, folder: Path) -> None:
    dist.init_process_group("gloo")
    prepare_process(CPU, threads=2)
    if stage == "zero3":
        file = folder / "zero3.json"
        settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
        file.write_text(json.dumps({"zero_optimization": settings}))
        stage = str(file)
    config = tiny_config(dataset, folder / "out", deepspeed=stage, validation=ValidationConfig(every=2, rows=9))
    without = train(prepare(config), every=0)
    within = train(prepare(config), every=2)
    assert within[0] == without[0], (within[0], without[0])
    for name, weight in without[2].items():
        assert torch.equal(weight, within[2][name]), name
    again = train(prepare(replace(config, seed=1)), every=0)
    assert again[0] != without[0]
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(within[1]))
        torch.save(within[2], folder / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
