"""Models and clips that the benchmarks of training share. Nothing here needs Ray, DeepSpeed or a dataset."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lumos.batch import PackedBatch, pack
from lumos.config import ModelConfig, lumos_1b, lumos_3b
from lumos.decoder import Decoder
from lumos.flops import Workload, dense_flops, exact_flops
from lumos.layout import build_sequence
from lumos.losses import LossModule
from lumos.masking import loss_mask, mask_from_scores
from lumos.vocabulary import Vocabulary

VOCABULARY = Vocabulary.lumos1()
MASK_RATIO = 0.8
_CAPTION_TOKENS = 59  # with markup, 66 tokens besides the frames


def cpu_156m() -> ModelConfig:
    """A model of 156 M parameters, most of them in the vocabulary, for CPUs."""
    return replace(lumos_1b(), hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, num_kv_heads=4)


@dataclass(frozen=True)
class Preset:
    """A model and the latent shape (t, h, w) of the clips it is trained on."""

    model: Callable[[], ModelConfig]
    shape: tuple[int, int, int]


PRESETS = {
    "cpu-156m": Preset(cpu_156m, (7, 16, 24)),
    "1b-256p": Preset(lumos_1b, (7, 32, 56)),
    "1b-384p": Preset(lumos_1b, (7, 48, 84)),
    "3b-256p": Preset(lumos_3b, (7, 32, 56)),
    "3b-384p": Preset(lumos_3b, (7, 48, 84)),
}


def whole_clips(shape: tuple[int, int, int], count: int = 1) -> PackedBatch:
    """Clips of random codes with a caption of random words and a tube mask, with all their tokens."""
    generator = np.random.default_rng(0)
    ids, masks, layouts = [], [], []
    for _ in range(count):
        text = generator.integers(10_000, 60_000, _CAPTION_TOKENS).tolist()
        codes = generator.integers(0, VOCABULARY.codebook_size, shape)
        tokens, layout = build_sequence(VOCABULARY, text, codes, fps=12.0)
        mask = torch.zeros(layout.length, dtype=torch.bool)
        scores = torch.from_numpy(generator.random(layout.frames[0].grid_size, dtype=np.float32))
        mask[layout.grid_index] = mask_from_scores(scores, MASK_RATIO)
        ids.append(tokens)
        masks.append(mask)
        layouts.append(layout)
    return PackedBatch(torch.cat(ids), torch.cat(masks), tuple(layouts))


def training_batch(whole: PackedBatch) -> PackedBatch:
    """The batch as training's loader packs it."""
    return pack(whole.ids, whole.masked_positions, whole.layouts, VOCABULARY)


def arithmetic(config: ModelConfig, batch: PackedBatch) -> dict[str, Any]:
    """Visual tokens that the loss is taken over, and the model's FLOPs of a step by both counts."""
    predicted = int(loss_mask(batch.ids, batch.masked_positions, VOCABULARY).sum())
    work = Workload.of(batch.layouts, visual_predictions=predicted)
    exact = exact_flops(config, work, visual_classes=VOCABULARY.codebook_size).model
    return {"predicted": predicted, "flops": {"exact": exact, "dense": dense_flops(config, work).model}}


def new_module(config: ModelConfig, *, autocast: torch.dtype | None = None) -> LossModule:
    """What `lumos train` calls forward and backward on, with weights drawn from a seed."""
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    return LossModule(decoder, VOCABULARY, autocast=autocast)


def step(module: LossModule, batch: PackedBatch) -> float:
    """Forward and backward of one batch, as in a training step; returns the mean loss."""
    module.zero_grad(set_to_none=True)
    total, _, counts = module(batch, max(len(layout.frames) for layout in batch.layouts))
    loss = total / counts.sum()
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return float(loss.detach())


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
