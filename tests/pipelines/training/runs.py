"""Configs and records of runs that take moments."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.training.config import (
    CheckpointConfig,
    DataConfig,
    ModelShape,
    OptimizerConfig,
    TrackingConfig,
    TrainConfig,
)
from pipelines.training.record import StepRecord

TINY = ModelShape(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32, max_seq_len=512
)


def tiny_config(dataset: Path, output: Path, **changes: Any) -> TrainConfig:
    """Two workers, float32, some buckets in micro-batches that are accumulated."""
    config = TrainConfig(
        output=str(output),
        data=DataConfig(dataset=str(dataset)),
        model=TINY,
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2, schedule="cosine", clip_norm=1.0),
        precision="fp32",
        steps=60,
        global_batch=8,
        micro_batch_tokens=256,
        num_workers=2,
        checkpoint=CheckpointConfig(every=10),
        tracking=TrackingConfig(flush_seconds=0.5),
        progress=False,
    )
    return replace(config, **changes)


def step_record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        time=1000.0 + step,
        loss=loss,
        frame_losses=(loss, loss / 2),
        lr=0.1,
        grad_norm=1.0,
        tokens=10,
        tokens_per_s=5.0,
        step_seconds=2.0,
        data_wait=0.0,
        masked_share=0.7,
        masked_tokens=7,
        epoch=0,
    )


def run_ranks(module: str, *arguments: object, processes: int = 2) -> None:
    """Processes that torchrun starts of a module beside this one, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", f"tests.pipelines.training.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to it")
