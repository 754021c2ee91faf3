"""The model at work: prompts to the bytes of video files. Nothing of Ray is needed here."""

import os
from collections.abc import Callable, Sequence

import torch

from lumos.api import Model
from pipelines.generation.config import ReplicaConfig
from pipelines.generation.model import ModelCard
from pipelines.generation.request import VideoRequest
from pipelines.media import encode_video

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class Engine:
    """A model, loaded, and what it draws written as files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if weights do not fit.
    """

    def __init__(self, card: ModelCard, replicas: ReplicaConfig) -> None:
        self._model = Model(card.folder, device=replicas.torch_device, dtype=_DTYPES[replicas.dtype])
        self.encoder = self._model.encoder

    def run(self, requests: Sequence[VideoRequest], abandoned: Callable[[], bool]) -> list[bytes]:
        """Files of a batch of requests, which share a size and a number of steps.

        On CPU in float32 each file depends on its own request only: the sampler sees to it for the codes, and videos
        are decoded and written one at a time.

        Args:
            requests: what to make.
            abandoned: asked after every latent frame.

        Raises:
            AbandonedError: if ``abandoned`` said so.
            ValueError: if requests do not fit together or the model.
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
