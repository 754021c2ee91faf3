"""The finished model as generation reads it: safetensors in the authors' key names, config, text tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lumos.checkpoint import save_state
from lumos.config import ModelConfig
from lumos.vocabulary import Vocabulary

TEXT_TOKENIZER_FILE = "text_tokenizer.json"


@dataclass(frozen=True)
class ExportSpec:
    """What an export holds beside the weights."""

    model: ModelConfig
    vocabulary: Vocabulary
    text_tokenizer: str  # text of the tokenizer's JSON file
    extra: dict[str, Any]  # how the model was made and how it is prompted: see ``export_extra``


def write_export(folder: Path, state: dict[str, Tensor], spec: ExportSpec) -> None:
    """Write the model and what is needed to prompt it."""
    save_state(folder, state, spec.model, spec.vocabulary, extra=spec.extra)
    (folder / TEXT_TOKENIZER_FILE).write_text(spec.text_tokenizer, encoding="utf-8")
