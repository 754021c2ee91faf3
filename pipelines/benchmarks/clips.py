"""Models and clips that the benchmarks of training share. Nothing here needs Ray, DeepSpeed or a dataset."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lumos.batch import PackedBatch, pack
from lumos.config import ModelConfig, lumos_1b, lumos_3b
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.losses import LossModule
from lumos.masking import loss_mask, mask_from_scores
from lumos.vocabulary import Vocabulary

VOCABULARY = Vocabulary.lumos1()
MASK_RATIO = 0.8
FPS = 12.0
_CAPTION_TOKENS = 59  # with markup, 66 tokens besides the frames


def cpu_156m() -> ModelConfig:
    """A model of 156 M parameters, most of them in the vocabulary, for CPUs."""
    return ModelConfig(
        vocab_size=VOCABULARY.vocab_size,
        visual_start=VOCABULARY.visual_start,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    )


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


def whole_clips(shape: tuple[int, int, int], count: int = 1, seed: int = 0) -> PackedBatch:
    """Clips of random codes with a caption of random words and a tube mask, with all their tokens."""
    generator = np.random.default_rng(seed)
    unit = VOCABULARY.cells_per_unit
    if shape[1] % unit or shape[2] % unit:
        raise ValueError(f"a frame of {shape[1]}x{shape[2]} cells is not a whole number of {unit} cells each way")
    ids, masks, layouts = [], [], []
    for _ in range(count):
        text = generator.integers(10_000, 60_000, _CAPTION_TOKENS).tolist()
        tokens, layout = build_sequence(
            VOCABULARY, text, generator.integers(0, VOCABULARY.codebook_size, shape), fps=FPS
        )
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


def masked_tokens(batch: PackedBatch) -> int:
    """Visual tokens that the loss is taken over."""
    return int(loss_mask(batch.ids, batch.masked_positions, VOCABULARY).sum())


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
