"""Small decoders, documents and model folders that several tests share."""

import numpy as np
import torch

from lumos.checkpoint import ModelInfo, save_checkpoint
from lumos.config import ModelConfig, SamplingConfig, TokenizerInfo
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.tokenizers import FsqTokenizer, TextTokenizer
from lumos.tokenizers.fsq import FsqKind
from lumos.tokenizers.text import EMBEDDED_FILE
from lumos.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(50, 32, grid_unit=8)


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": VOCABULARY.vocab_size,
        "visual_start": VOCABULARY.visual_start,
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
        for weight, *_ in model.weight_parts():
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


def save_tiny_folder(path, *, kind: FsqKind = "fsq") -> None:
    """A model folder as `lumos train` exports one, with random weights and the tokenizers in the package."""
    text, video = TextTokenizer.load(), FsqTokenizer(kind=kind)
    vocabulary = Vocabulary.compact(text.vocab_size, video.codebook_size, grid_unit=16)
    info = ModelInfo(
        shapes=((2, 2, 4), (3, 2, 4)),
        fps=12.0,
        tokenizer=TokenizerInfo(video.kind, video.codebook_size, video.compression, video.weights_hash),
        text_tokenizer_hash=text.hash,
        sampling=SamplingConfig(num_steps=3, guidance_scale=2.0),
    )
    model = tiny_model(vocab_size=vocabulary.vocab_size, max_seq_len=200)
    save_checkpoint(path, model, vocabulary, info=info, text_tokenizer=EMBEDDED_FILE.read_text(encoding="utf-8"))
