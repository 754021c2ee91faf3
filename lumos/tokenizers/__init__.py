"""Tokenizers: video frames to integer grids and back, and text to token ids."""

from lumos.config import TokenizerConfig
from lumos.tokenizers.cosmos import CosmosTokenizer
from lumos.tokenizers.fsq import FsqTokenizer
from lumos.tokenizers.text import TextTokenizer
from lumos.tokenizers.video import VideoTokenizer

__all__ = [
    "CosmosTokenizer",
    "FsqTokenizer",
    "TextTokenizer",
    "TokenizerConfig",
    "VideoTokenizer",
    "load_video_tokenizer",
]


def load_video_tokenizer(config: TokenizerConfig) -> VideoTokenizer:
    """Load the tokenizer that a config names.

    Raises:
        FileNotFoundError: A file is absent; the message says which, where to get it and how to do without.
        ValueError: A file is not what it should be, or a Cosmos tokenizer has no path.
    """
    if config.kind != "cosmos":
        return FsqTokenizer(config.path, kind=config.kind, device=config.device)
    if config.path is None:
        raise ValueError("tokenizer kind cosmos needs a path: the folder with its encoder.jit and decoder.jit")
    return CosmosTokenizer(config.path, device=config.device)
