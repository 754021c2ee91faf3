"""Small decoders and documents that several tests share."""

import numpy as np
import torch

from lumos.config import ModelConfig
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(50, 32, grid_unit=8)


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": VOCABULARY.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
    }
    return ModelConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes) -> Decoder:
    """A decoder with weights large enough that its logits are far from uniform."""
    model = Decoder(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model.eval()


def documents(*text_lengths: int, shape=(3, 2, 4), seed: int = 0):
    """Training sequences of random text and codes, and their layouts."""
    rng = np.random.default_rng(seed)
    built = []
    for length in text_lengths:
        text = rng.integers(1, VOCABULARY.text_vocab_size, length).tolist()
        codes = rng.integers(0, VOCABULARY.codebook_size, shape)
        built.append(build_sequence(VOCABULARY, text, codes, fps=12))
    return [ids for ids, _ in built], [layout for _, layout in built]
