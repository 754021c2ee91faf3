"""The Lumos-1 model in plain PyTorch: layouts, MM-RoPE, attention, AR-DF, sampling, tokenizers, checkpoints.

The names below are loaded when they are first used, so that ``import lumos`` itself loads nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumos.api import Model, load
    from lumos.checkpoint import ModelInfo, load_checkpoint, save_checkpoint
    from lumos.compression import VideoSize
    from lumos.config import MaskConfig, ModelConfig, SamplingConfig
    from lumos.decoder import Decoder
    from lumos.guidance import GenerationRequest
    from lumos.tokenizers import TextTokenizer, TokenizerConfig, VideoTokenizer, load_video_tokenizer
    from lumos.vocabulary import Vocabulary

__all__ = [
    "Decoder",
    "GenerationRequest",
    "MaskConfig",
    "Model",
    "ModelConfig",
    "ModelInfo",
    "SamplingConfig",
    "TextTokenizer",
    "TokenizerConfig",
    "VideoSize",
    "VideoTokenizer",
    "Vocabulary",
    "load",
    "load_checkpoint",
    "load_video_tokenizer",
    "save_checkpoint",
]

_MODULES = {
    "lumos.api": ("Model", "load"),
    "lumos.checkpoint": ("ModelInfo", "load_checkpoint", "save_checkpoint"),
    "lumos.compression": ("VideoSize",),
    "lumos.config": ("MaskConfig", "ModelConfig", "SamplingConfig"),
    "lumos.decoder": ("Decoder",),
    "lumos.guidance": ("GenerationRequest",),
    "lumos.tokenizers": ("TextTokenizer", "TokenizerConfig", "VideoTokenizer", "load_video_tokenizer"),
    "lumos.vocabulary": ("Vocabulary",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
