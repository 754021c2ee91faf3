"""Run by two processes: first weights through DeepSpeed, a step, the export and its reading (test_initialize.py)."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lumos.checkpoint import load_checkpoint, save_checkpoint
from lumos.config import MaskConfig, ModelConfig
from lumos.decoder import Decoder
from lumos.head import join_weights
from lumos.layout import build_sequence
from lumos.losses import LossModule, PackedBatch
from lumos.masking import sample_masked_positions
from lumos.vocabulary import Vocabulary
from pipelines.streams import torch_stream
from pipelines.training.engine import make_engine, prepare_process
from pipelines.training.initialize import build_decoder
from pipelines.training.step import StepBatch, TrainStep
from tests.pipelines.training.foreign import TEXT_ROWS, VOCABULARY, full_weights, small_model
from tests.pipelines.training.runs import tiny_config

CPU = torch.device("cpu")


def batch(vocabulary: Vocabulary) -> StepBatch:
    codes = np.random.default_rng(dist.get_rank()).integers(0, 16, (2, 4, 4))
    ids, layout = build_sequence(vocabulary, [1, 2], codes, fps=12.0)
    masked = sample_masked_positions(layout, MaskConfig(), torch.Generator().manual_seed(0))
    return StepBatch(0, 0, (PackedBatch(ids, masked, (layout,)),), (2, 4, 4), 0, 2, 0, 0)


def run(
    folder: Path, source: str | None, zero: str, model: ModelConfig, vocabulary: Vocabulary
) -> dict[str, torch.Tensor]:
    deepspeed_file = str(folder / "zero3.json") if zero == "zero3" else zero
    init_from = str(folder / source) if source else None
    config = tiny_config(folder, folder, deepspeed=deepspeed_file, init_from=init_from, global_batch=2)
    decoder = build_decoder(config, model, vocabulary, device=CPU)
    if zero == "zero3":
        assert all(parameter.numel() == 0 for parameter in decoder.parameters()), "not partitioned"
    engine = make_engine(LossModule(decoder, vocabulary, 0.0), config)
    before = join_weights(full_weights(decoder), decoder.lm_head)
    if source is None:
        plain = Decoder(model)
        plain.init_weights(torch_stream(config.seed, "init"))
        assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    elif source == "release":
        theirs = load_checkpoint(folder / source).model.state_dict()
        assert all(torch.equal(before[key], theirs[key]) for key in theirs)
    else:
        assert float(before["lm_head.weight"][:TEXT_ROWS].std()) > 0.5, "text rows are not the Llama's"
    result = TrainStep(engine, vocabulary, device=CPU)(batch(vocabulary), lr=1e-3, data_wait=0.0)
    assert np.isfinite(result.loss)
    after = join_weights(full_weights(decoder), decoder.lm_head)
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[key], after[key]), "the step changed nothing"
    if dist.get_rank() == 0:
        exported = folder / f"export-{source}-{zero}"
        save_checkpoint(exported, Decoder(model), vocabulary, state=after)
        again = load_checkpoint(exported).model.state_dict()
        assert all(torch.equal(again[key], after[key]) for key in after), "saved and read, not bit for bit"
    dist.barrier()
    return after


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    prepare_process(CPU, threads=1)
    lumos1 = Vocabulary.lumos1()
    release = small_model(lumos1, num_layers=1, hidden_size=32, intermediate_size=64)
    whole = run(folder, None, "zero1", small_model(), VOCABULARY)
    run(folder, "llama", "zero1", small_model(), VOCABULARY)
    run(folder, "release", "zero1", release, lumos1)
    parts = run(folder, None, "zero3", small_model(), VOCABULARY)
    for key, weight in whole.items():  # the step's weight decay is 1e-4 of a weight, of most more than 1e-6
        # Not the largest difference: the first update of Adam takes but the sign of a gradient next to nothing.
        assert float((parts[key] - weight).abs().median()) < 1e-7, f"{key} is not what ZeRO-1 makes of it"
    run(folder, "llama", "zero3", small_model(), VOCABULARY)
    dist.destroy_process_group()
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(Path(sys.argv[1]))
