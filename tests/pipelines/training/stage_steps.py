"""Run by one process: the shipped stages one after another, at CPU size (test_stages.py).

Each is its own YAML with overrides of size and place alone. Everything but Ray is that of a training: the checks, the
batch plan and the loader, first weights, the engine, the step, the export, which the next stage begins with.
"""

import json
import math
import os
import sys
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist

from lumos.checkpoint import load_checkpoint, save_checkpoint
from lumos.losses import LossModule
from pipelines.config import load_config
from pipelines.training.config import TrainConfig
from pipelines.training.engine import make_engine, prepare_process
from pipelines.training.ingest import StepLoader, unpack
from pipelines.training.initialize import build_decoder
from pipelines.training.prepare import prepare
from pipelines.training.step import TrainStep
from tests.pipelines.training.foreign import full_weights
from tests.pipelines.training.snapshots import write_snapshot

CPU = torch.device("cpu")
STEPS = 2
# stage: latent shapes (t, h, w) of its made snapshots, images and videos
STAGES = {
    "image-256p": [(1, 4, 4)],
    "joint-256p": [(1, 4, 4), (2, 4, 4)],
    "joint-384p": [(1, 4, 6), (2, 4, 6)],
    "sft-384p": [(1, 4, 6), (2, 4, 6)],
}
SMALL = (
    "model.hidden_size=64 model.intermediate_size=96 model.num_layers=2 model.num_heads=4 model.num_kv_heads=2 "
    "model.head_dim=32 data.vocabulary=compact data.grid_unit=16 data.text_tokenizer=null deepspeed=zero1 "
    "resources.device=cpu num_workers=1 checkpoint.storage=null validation.every=0"
)


def overrides(folder: Path, stage: str, before: str | None) -> list[str]:
    paths = [write_snapshot(folder / f"{stage}-{number}", {shape: 12}) for number, shape in enumerate(STAGES[stage])]
    found = [*SMALL.split(), f"output={folder / stage}", f"steps={STEPS}", "optimizer.warmup_steps=1"]
    found += ["global_batch=2", "image_batch=6"] if before else ["global_batch=6"]
    found += [f"init_from={folder / before}"] if before else []
    if len(paths) == 1:
        return [*found, f"data.dataset={paths[0]}"]
    return found + [f"data.sources.{number}.dataset={path}" for number, path in enumerate(paths)]


def run(config: TrainConfig) -> set[str]:
    """Train as a worker does; returns the latent shapes seen."""
    prepared = prepare(config)
    decoder = build_decoder(config, prepared.model, prepared.vocabulary, device=CPU)
    first = {name: weight.detach().clone() for name, weight in decoder.named_parameters()}
    if config.init_from is not None:
        theirs = dict(load_checkpoint(Path(config.init_from) / "export").model.named_parameters())
        assert all(torch.equal(weight, theirs[name]) for name, weight in first.items()), "not the stage before"
    step = TrainStep(make_engine(LossModule(decoder, prepared.vocabulary), config), prepared.vocabulary, device=CPU)
    tables = StepLoader(prepared, 0, 1)(pa.table({"first": [0], "stop": [config.steps]}))
    shapes = set()
    for batch in (batch for table in tables for batch in unpack(table)):
        shapes.add("x".join(map(str, batch.shape)))
        assert math.isfinite(step(batch, lr=1e-3, data_wait=0.0).loss)
    weights = full_weights(decoder)
    assert not torch.equal(weights["lm_head.visual"], first["lm_head.visual"])
    save_checkpoint(
        Path(config.output) / "export", decoder, prepared.vocabulary, state=weights, info=prepared.info,
        text_tokenizer=prepared.text_tokenizer,
    )  # fmt: skip
    return shapes


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    prepare_process(CPU, threads=1)
    before = None
    for stage, shapes in STAGES.items():
        config = load_config(TrainConfig, f"1b-{stage}", overrides(folder, stage, before))
        assert run(config) == {"x".join(map(str, shape)) for shape in shapes}
        before = stage
    (folder / "done.json").write_text(json.dumps(list(STAGES)))
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(Path(sys.argv[1]))
