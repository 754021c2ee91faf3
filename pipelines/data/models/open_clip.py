"""Loading open_clip models from files, without a hub; and frames as they want them."""

import hashlib
import importlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import storage
from pipelines.data.settings import OpenClipConfig
from pipelines.errors import UserError
from pipelines.storage.cache import local_path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_TEXT_FILES = (".json", ".txt", ".model")  # of config and tokenizer
_CONFIG = "open_clip_config.json"
_WHERE = (
    "download it where there is a network, for example OpenAI's ViT-L-14 with `huggingface-cli download timm/"
    "vit_large_patch14_clip_224.openai open_clip_config.json open_clip_model.safetensors --local-dir FOLDER`"
)


def fetched(path: str, key: str, *, where: str) -> str:
    """The path on this machine of a file or folder that a config key names; fetched once if it lies in a store.

    Messages tell the key, and where such a file is to be had.

    Raises:
        UserError: if it is not there.
    """
    try:
        here = local_path(path)
    except FileNotFoundError:
        here = ""
    if not os.path.exists(here):
        raise UserError(f"{key} {path} does not exist; {where}, or set {key}=null to run without it")
    return here


def file_hash(path: str, key: str, *, where: str) -> str:
    """SHA-256 of a file (or, of a folder, over the names and hashes of its config, tokenizer and weights).

    Raises:
        UserError: as ``fetched``.
    """
    here = fetched(path, key, where=where)
    if os.path.isfile(here):
        return storage.sha256_file(here)
    names = sorted(name for name in os.listdir(here) if name.endswith((*_WEIGHTS, *_TEXT_FILES)))
    if _CONFIG in names and any(name.endswith(_WEIGHTS) for name in names):
        parts = [f"{name} {storage.sha256_file(os.path.join(here, name))}" for name in names]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    raise UserError(f"{key} {path} is a folder without {_CONFIG} and weights beside it; {where}")


def open_clip_hash(config: OpenClipConfig, key: str) -> str:
    """What identifies a model: its architecture and weights.

    Raises:
        UserError: if the weights are not there.
    """
    assert config.weights is not None
    digest = file_hash(config.weights, key, where=_WHERE)
    return digest if os.path.isdir(fetched(config.weights, key, where=_WHERE)) else f"{config.model} {digest}"


@dataclass(frozen=True)
class OpenClip:
    """A loaded model."""

    model: Any  # in eval mode, on its device, float32
    tokenizer: Callable[[list[str]], Tensor]  # texts to token ids, [batch, context]
    size: int  # px, both ways, of the images it takes
    device: str

    def images(self, frames: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Frames [height, width, 3] as the model wants them: shorter side fitted, centre cut, normalised."""
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (self.model.visual.image_mean, self.model.visual.image_std)
        )
        fitted = np.stack([fit_shorter_side(frame, self.size) for frame in frames])
        pixels = torch.from_numpy(fitted).permute(0, 3, 1, 2).float() / 255
        return ((pixels - mean) / std).to(self.device)


def load_open_clip(config: OpenClipConfig, key: str) -> OpenClip:
    """Load a model and its tokenizer.

    Raises:
        UserError: if the weights are missing, or do not fit the architecture.
    """
    assert config.weights is not None
    open_clip = importlib.import_module("open_clip")  # it brings torchvision along, which takes seconds
    here = fetched(config.weights, key, where=_WHERE)
    folder = os.path.isdir(here)
    name = f"local-dir:{os.path.abspath(here)}" if folder else config.model
    pretrained = None if folder else here
    try:
        model = open_clip.create_model(name, pretrained=pretrained, device=config.device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, AssertionError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{key} {config.weights} cannot be loaded as {'a folder of open_clip' if folder else config.model}: "
            f"{str(error)[:300]}; name the architecture of these weights in {key.rpartition('.')[0]}.model"
        ) from error
    size = model.visual.image_size
    return OpenClip(model.eval(), tokenizer, size[0] if isinstance(size, tuple) else size, config.device)


def check_open_clip(config: OpenClipConfig, key: str) -> int:
    """Load a model once, on the CPU, before hours of work that lead to it; how many features an image gets.

    Raises:
        UserError: if the weights are missing, or do not fit the architecture.
    """
    clip = load_open_clip(replace(config, device="cpu"), key)
    with torch.inference_mode():
        return int(clip.model.encode_image(torch.zeros(1, 3, clip.size, clip.size)).shape[-1])


def fit_shorter_side(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale a frame [height, width, 3] so that its shorter side has ``size`` px, and cut out the centre square."""
    scaled = scale_shorter_side(frame, size)
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return scaled[top : top + size, left : left + size]


def scale_shorter_side(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale a frame [height, width, 3] so that its shorter side has ``size`` px."""
    height, width = frame.shape[:2]
    scale = size / min(height, width)
    scaled_size = (max(size, round(width * scale)), max(size, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, scaled_size, interpolation=method), np.uint8)


def in_batches(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """A function of many rows, called with just ``size`` of them at a time: zeros fill up the last batch.

    A product over another number of rows may round otherwise.
    """
    done = []
    for batch in rows.split(size):
        fill = batch.new_zeros(size - len(batch), *batch.shape[1:])
        done.append(function(torch.cat([batch, fill]))[: len(batch)])
    return torch.cat(done)
