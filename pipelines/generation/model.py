"""A model: what is known of it before its weights are loaded, and at work. Nothing of Ray is needed here.

Everything a user can get wrong about a model is found by ``read_card``, in the driver, before Ray starts.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lumos.api import Model
from lumos.checkpoint import check_weights
from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.folder import ModelFolder, open_folder
from lumos.layout import header_tokens, prompt_text
from pipelines import storage
from pipelines.cores import usable_cores
from pipelines.errors import UserError
from pipelines.generation.config import ModelRunConfig, ReplicaConfig
from pipelines.generation.request import VideoRequest
from pipelines.media import encode_jpeg, encode_video
from pipelines.storage import s3
from pipelines.storage.cache import local_path

_TOLD_SIZES = 8  # at most, of those that a model was trained on


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model folder, checked, and how this run draws with it."""

    folder: ModelFolder  # on the machine that read it
    config: ModelRunConfig
    sampling: SamplingConfig  # of requests that say nothing: the run's, completed from what the model recommends
    identity: dict[str, Any]  # hashes and settings on the model's side that decide a video

    def has_trained_shape(self, size: VideoSize) -> bool:
        """Whether the model was trained on videos of these pixels and frames, at whatever rate."""
        return size.latent_shape in {tuple(shape) for shape in self.folder.info.shapes}

    def untrained(self, size: VideoSize) -> str | None:
        """What to tell of a size that the model was not trained on; nothing where it was, or its folder names none."""
        info = self.folder.info
        if not info.shapes or info.fps is None or self._begins_trained(size):
            return None
        known = self.has_trained_shape(size)
        if known and (size.num_frames == 1 or math.isclose(size.fps, info.fps, rel_tol=1e-5)):  # float32 in a shard
            return None
        trained = ", ".join(str(VideoSize.of_latents(shape, info.fps)) for shape in info.shapes[:_TOLD_SIZES])
        more = len(info.shapes) - _TOLD_SIZES
        trained += f" and {more} more" if more > 0 else ""
        return f"{size} is no {'rate' if known else 'size'} that the model was trained on: {trained}"

    def _begins_trained(self, size: VideoSize) -> bool:
        """Whether longer videos of the training begin as one of this size: no token before its frames differs.

        Frames see only those before them, so it is then drawn as the begin of such a video.
        """
        info, vocabulary, template = self.folder.info, self.folder.vocabulary, self.folder.prompt_template

        def before(each: VideoSize) -> tuple[str, list[int]]:
            header = header_tokens(vocabulary, [], num_latents=each.latent_shape[0], fps=each.fps)
            return prompt_text(template, "", each), header.tolist()

        trained = [VideoSize.of_latents(shape, info.fps or 1.0) for shape in info.shapes]
        pixels = (size.width, size.height)
        longer = [each for each in trained if (each.width, each.height) == pixels and each.num_frames > size.num_frames]
        untold = size.num_frames > 1 or not info.motion_prefix  # the prompts of videos tell of motion, of images not
        return untold and any(before(each) == before(size) for each in longer)

    def folder_here(self) -> ModelFolder:
        """The folder on the machine of this process, fetched from a store if need be.

        Raises:
            UserError: if its weights are not those of the card, as where a replica is lost and another loads them
                later: videos would be of another model than their hashes say.
        """
        remote = not all(map(storage.is_local, model_places(self.config).values()))
        folder = _open(self.config) if remote else self.folder
        if _digest(Path(folder.path)) != self.identity["weights"]:
            damaged = f", or remove {folder.path} where it was damaged" if remote else ""
            raise UserError(
                f"the weights in {self.config.model} are not those that this run began with: put them back, or begin "
                f"again (a service: by SIGHUP){damaged}"
            )
        return folder


def read_card(config: ModelRunConfig) -> ModelCard:
    """Inspect the model a config names.

    Raises:
        UserError: if it is missing or damaged, or its tokenizers are missing or not those it was trained with; the
            message names both sides.
    """
    folder = _open(config)
    identity: dict[str, Any] = {
        "weights": _digest(Path(folder.path)),
        "text_tokenizer": folder.text_tokenizer_hash,
        "video_tokenizer": folder.video_tokenizer_hash,
        "prompt_template": folder.prompt_template,
        "device": config.replicas.torch_device,
        "dtype": config.replicas.dtype,
    }
    if config.replicas.compile:  # rounds in another way
        identity["compile"] = True
    return ModelCard(
        folder=folder, config=config, sampling=config.sampling.over(folder.info.sampling), identity=identity
    )


def model_places(config: ModelRunConfig) -> dict[str, str]:
    """Where the files of a model are that every replica reads, by the keys that name them."""
    places = {"model": config.model, "text_tokenizer": config.text_tokenizer, "tokenizer.path": config.tokenizer.path}
    return {key: place for key, place in places.items() if place}


def _open(config: ModelRunConfig) -> ModelFolder:
    """The folder on this machine, and what is wrong with it as a ``UserError``, under the names of the config."""
    here: dict[str, str] = {}
    try:
        for place in model_places(config).values():
            if not storage.is_local(place):
                _check_model(place, of_model=place == config.model)
                here[place] = local_path(place)
        folder = open_folder(
            here.get(config.model, config.model),
            prompt_template=config.prompt_template,
            text_tokenizer=here.get(config.text_tokenizer or "", config.text_tokenizer),
            tokenizer=here.get(config.tokenizer.path or "", config.tokenizer.path),
            tokenizer_kind=config.tokenizer.kind,
        )
        check_weights(folder.path)
    except (OSError, ValueError) as error:
        message = str(error)
        for place, path in here.items():
            message = message.replace(path, place)
        raise UserError(message) from error
    return folder


def _check_model(uri: str, *, of_model: bool) -> None:
    """Refuse what would be fetched in vain; what uploads a model writes its config last."""
    s3.check_store(uri)
    if of_model and not storage.exists(storage.join(uri, "config.json")):
        export = storage.join(uri, "export", "config.json")
        hint = (
            f"it is a training's output, whose model is {uri.rstrip('/')}/export"
            if storage.exists(export)
            else "name the export folder of a finished training, or of a released Lumos-1 checkpoint; one that is "
            "being written has it last"
        )
        raise FileNotFoundError(f"model: {uri} has no config.json: {hint}")


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

    def __init__(self, folder: ModelFolder, replicas: ReplicaConfig) -> None:
        dtype = getattr(torch, replicas.dtype)
        self._model = Model(folder, device=replicas.torch_device, dtype=dtype, compile=replicas.compile)
        self.encoder = self._model.encoder

    def run(
        self,
        requests: Sequence[VideoRequest],
        abandoned: Callable[[], bool],
        on_frame: Callable[[int, NDArray[np.int64]], None] | None = None,
    ) -> list[bytes]:
        """Files of a batch of requests, of one kind.

        On CPU in float32 each file depends on its own request only: the sampler sees to it for the codes, and videos
        are decoded and written one at a time. ``abandoned`` is asked before every step; if it says so, an
        ``AbandonedError`` ends the work. ``on_frame`` is called, after every latent frame, with the place of a request
        and its codes so far.
        """

        def stop_if_abandoned() -> None:
            if abandoned():
                raise AbandonedError

        def keep(index: int, _latent: int, codes: NDArray[np.int64]) -> None:
            drawn[index].append(codes)
            if on_frame:
                on_frame(index, np.stack(drawn[index]))

        encoded = [request.encode(self.encoder, self._codes(request)) for request in requests]
        drawn = [[] if request.given is None else list(request.given) for request in encoded]
        videos = self._model.draw(encoded, on_frame=keep, on_step=stop_if_abandoned)
        return [
            encode_video(frames, request.size.fps, request.format)
            for request, frames in zip(requests, videos, strict=True)
        ]

    def _codes(self, request: VideoRequest) -> NDArray[np.int64] | None:
        return None if request.given is None else self._model.encode_frames(request.given)

    def picture(self, codes: NDArray[np.int64]) -> bytes:
        """A JPEG of the last frame that codes [t, h, w] of the first latent frames of a video decode to."""
        frames = self._model.tokenizer.decode(torch.from_numpy(codes)[None])[0]
        return encode_jpeg(frames[-1].cpu().numpy())


def set_threads(replicas: ReplicaConfig) -> None:
    """Set the torch threads of this thread's work; Ray starts workers with one thread per reserved CPU."""
    torch.set_num_threads(replicas.threads or max(1, usable_cores() // replicas.num_replicas))
