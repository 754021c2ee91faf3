"""The finished model as generation reads it: safetensors in the authors' key names, config, text tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lumos.checkpoint import ModelInfo, save_state
from lumos.config import ModelConfig
from lumos.vocabulary import Vocabulary


@dataclass(frozen=True)
class ExportSpec:
    """What an export holds beside the weights."""

    model: ModelConfig
    vocabulary: Vocabulary
    text_tokenizer: str  # text of the tokenizer's JSON file
    info: ModelInfo


def write_export(folder: Path, state: dict[str, Tensor], spec: ExportSpec) -> None:
    """Write the model and what is needed to prompt it."""
    save_state(folder, state, spec.model, spec.vocabulary, info=spec.info, text_tokenizer=spec.text_tokenizer)
