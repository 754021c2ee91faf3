"""What is known of a model before its weights are loaded: tokenizers, sampling and identity.

Everything a user can get wrong about a model is found here, in the driver, before Ray starts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.checkpoint import check_weights
from lumos.config import SamplingConfig
from lumos.folder import ModelFolder, open_folder
from pipelines.errors import UserError
from pipelines.generation.config import ModelRunConfig


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model folder, checked, and how this run draws with it."""

    folder: ModelFolder
    sampling: SamplingConfig  # of requests that say nothing: the run's, completed from what the model recommends
    identity: dict[str, Any]  # hashes and settings on the model's side that decide a video


def read_card(config: ModelRunConfig) -> ModelCard:
    """Inspect the model a config names.

    Raises:
        UserError: if it is missing or damaged, or its tokenizers are missing or not those it was trained with; the
            message names both sides.
    """
    try:
        folder = open_folder(
            config.model,
            prompt_template=config.prompt_template,
            text_tokenizer=config.text_tokenizer,
            tokenizer=config.tokenizer.path,
            tokenizer_kind=config.tokenizer.kind,
        )
        check_weights(folder.path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    identity = {
        "weights": _digest(Path(folder.path)),
        "text_tokenizer": folder.text_tokenizer_hash,
        "video_tokenizer": folder.video_tokenizer_hash,
        "prompt_template": folder.prompt_template,
        "device": config.replicas.torch_device,
        "dtype": config.replicas.dtype,
    }
    return ModelCard(folder=folder, sampling=config.sampling.over(folder.info.sampling), identity=identity)


def _digest(folder: Path) -> str:
    """SHA-256 over config and weights, so that a model retrained into the same folder is another model."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.index.json")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
