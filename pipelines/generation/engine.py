"""The model at work: prompts to the bytes of video files. Nothing of Ray is needed here."""

import os
from collections.abc import Callable, Sequence

import torch

from lumos.checkpoint import load_checkpoint
from lumos.sampling import generate
from lumos.tokenizers import load_video_tokenizer
from pipelines.generation.config import ReplicaConfig
from pipelines.generation.model import ModelCard, RequestEncoder
from pipelines.generation.request import VideoRequest
from pipelines.media import encode_video

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AbandonedError(Exception):
    """Nobody waits for the batch any more."""


class Engine:
    """A model with its tokenizers, loaded.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if weights do not fit.
    """

    def __init__(self, card: ModelCard, replicas: ReplicaConfig) -> None:
        self.encoder = RequestEncoder(card)
        checkpoint = load_checkpoint(card.path, device=replicas.torch_device, dtype=_DTYPES[replicas.dtype])
        self._model, self._vocabulary = checkpoint.model, checkpoint.vocabulary
        self._tokenizer = load_video_tokenizer(card.video_tokenizer)

    def run(self, requests: Sequence[VideoRequest], abandoned: Callable[[], bool]) -> list[bytes]:
        """Files of a batch of requests, which share a size and a number of steps.

        On CPU in float32 each file depends on its own request only: the sampler sees to it for the codes, and frames
        are decoded and written one video at a time.

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

        encoded = [self.encoder.encode(request) for request in requests]
        videos = generate(self._model, self._vocabulary, encoded, on_frame=stop_if_abandoned)
        files = []
        for request, codes in zip(requests, videos, strict=True):
            frames = self._tokenizer.decode(torch.from_numpy(codes)[None])[0]
            files.append(encode_video(frames.cpu().numpy(), request.size.fps, request.format))
        return files


def set_threads(replicas: ReplicaConfig) -> None:
    """Set the torch threads of this thread's work; Ray starts workers with one thread per reserved CPU."""
    torch.set_num_threads(replicas.threads or default_threads(replicas.num_replicas))


def default_threads(num_replicas: int) -> int:
    """Cores this process may use, shared among the replicas of a node."""
    return max(1, len(os.sched_getaffinity(0)) // num_replicas)
