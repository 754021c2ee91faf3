"""A model: what is known of it before its weights are loaded, and at work. Nothing of Ray is needed here.

Everything a user can get wrong about a model is found by ``read_card``, in the driver, before Ray starts.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumos.api import Model
from lumos.checkpoint import check_weights
from lumos.config import SamplingConfig
from lumos.folder import ModelFolder, open_folder
from pipelines.errors import UserError
from pipelines.generation.config import ModelRunConfig, ReplicaConfig
from pipelines.generation.request import VideoRequest
from pipelines.media import encode_video


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


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class Engine:
    """A model, loaded, and what it draws written as files."""

    def __init__(self, card: ModelCard, replicas: ReplicaConfig) -> None:
        self._model = Model(card.folder, device=replicas.torch_device, dtype=getattr(torch, replicas.dtype))
        self.encoder = self._model.encoder

    def run(self, requests: Sequence[VideoRequest], abandoned: Callable[[], bool]) -> list[bytes]:
        """Files of a batch of requests, which share a size and a number of steps.

        On CPU in float32 each file depends on its own request only: the sampler sees to it for the codes, and videos
        are decoded and written one at a time. ``abandoned`` is asked after every latent frame; if it says so, an
        ``AbandonedError`` ends the work.
        """

        def stop_if_abandoned(*_: object) -> None:
            if abandoned():
                raise AbandonedError

        encoded = [request.encode(self.encoder) for request in requests]
        videos = self._model.draw(encoded, on_frame=stop_if_abandoned)
        return [
            encode_video(frames, request.size.fps, request.format)
            for request, frames in zip(requests, videos, strict=True)
        ]


def set_threads(replicas: ReplicaConfig) -> None:
    """Set the torch threads of this thread's work; Ray starts workers with one thread per reserved CPU."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(replicas.threads or max(1, cores // replicas.num_replicas))
