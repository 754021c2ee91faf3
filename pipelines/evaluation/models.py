"""Models that metrics look through, from files that the user names: CLIP by open_clip, LPIPS and I3D by TorchScript."""

import threading
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import storage
from pipelines.cores import usable_cores
from pipelines.data.models.open_clip import in_batches, load_open_clip, open_clip_hash
from pipelines.data.settings import OpenClipConfig
from pipelines.errors import UserError

_CLIP_FRAMES = 8  # of a video that CLIP looks at, evenly spread
_BATCH = 8  # pictures of one call, always as many, so that features do not depend on what else is in it
_LEAST_FRAMES = 10  # that I3D can take
_WHERE = {
    "clip": "a file of weights, or a folder of open_clip's with open_clip_config.json; where there is a network: "
    "`huggingface-cli download timm/vit_large_patch14_clip_336.openai open_clip_config.json "
    "open_clip_model.safetensors --local-dir FOLDER`",
    "lpips": "a TorchScript file that is called as NVIDIA's vgg16.pt, which is at nvlabs-fi-cdn.nvidia.com/"
    "stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt",
    "fvd": "a TorchScript file that is called as i3d_torchscript.pt of github.com/universome/fvd-comparison",
}


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Which models there are; None: their metrics are left out."""

    clip: str | None = None  # weights file, or folder of open_clip's
    clip_model: str = "ViT-L-14-336"  # architecture of a weights file; a folder names its own
    lpips: str | None = None  # TorchScript
    fvd: str | None = None  # TorchScript
    device: str = "cpu"

    @property
    def given(self) -> dict[str, str]:
        """Those that are named."""
        named = {"clip": self.clip, "lpips": self.lpips, "fvd": self.fvd}
        return {name: path for name, path in named.items() if path is not None}


class Models:
    """Loaded models. Calls from several threads wait for each other.

    Raises:
        UserError: if a file is missing or of another kind.
    """

    def __init__(self, files: ModelFiles) -> None:
        for name, path in files.given.items():
            if not Path(path).exists():
                raise UserError(f"--{name} {path} does not exist; it takes {_WHERE[name]}")
        # Torch's own choice leaves out of account that a container may have fewer cores' worth of time.
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        self.device, self._lock = files.device, threading.Lock()
        self._texts: dict[str, NDArray[np.float32]] = {}
        self.hashes: dict[str, str] = {}  # what identifies each model
        if files.clip is not None:
            config = OpenClipConfig(weights=files.clip, model=files.clip_model, device=files.device)
            try:
                self._clip = load_open_clip(config, "--clip")
            except UserError as error:
                raise UserError(
                    f"--clip {files.clip} cannot be loaded as {files.clip_model} "
                    f"({str(error.__cause__ or error)[:200]}): name the architecture of these weights by --clip-model, "
                    f"or give {_WHERE['clip']}"
                ) from error
            self.hashes["clip"] = open_clip_hash(config, "--clip")
        self._lpips = self._script("lpips", files.lpips)
        self._i3d = self._script("fvd", files.fvd)

    def _script(self, name: str, path: str | None) -> Any:
        """A TorchScript module. It is code that runs here: only what the user named is loaded, and its hash kept."""
        if path is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
                module = torch.jit.load(path, map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--{name} {path} is no TorchScript file ({reason}); it takes {_WHERE[name]}") from error
        self.hashes[name] = storage.sha256_file(path)
        return module

    @torch.inference_mode()
    def clip_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of unit length [n, width] of frames evenly spread over a video."""
        count = min(_CLIP_FRAMES, len(frames))
        chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, count).round().astype(int)]
        with self._lock:
            encode = partial(self._clip.model.encode_image, normalize=True)
            return np.asarray(in_batches(encode, self._clip.images(chosen), _BATCH).float().cpu().numpy(), np.float32)

    @torch.inference_mode()
    def clip_text(self, prompt: str) -> NDArray[np.float32]:
        """Features of unit length [width] of a text; the model reads its first 77 tokens or so."""
        with self._lock:
            if prompt not in self._texts:
                tokens = self._clip.tokenizer([prompt]).to(self.device)
                self._texts[prompt] = self._clip.model.encode_text(tokens, normalize=True)[0].float().cpu().numpy()
            return self._texts[prompt]

    @torch.inference_mode()
    def lpips(self, frames: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
        """Mean LPIPS of pairs of frames: the squared distance of the features that the file gives."""
        total = 0.0
        for first in range(0, len(frames), _BATCH):
            with self._lock, self._told("lpips"):
                one, two = (
                    self._lpips(self._pixels(x[first : first + _BATCH]), resize_images=False, return_lpips=True)
                    for x in (frames, others)
                )
                total += float(((one - two) ** 2).flatten(1).sum())
        return total / len(frames)

    @torch.inference_mode()
    def video_features(self, frames: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """I3D features [1, width] of a video; None of one that is too short for it."""
        if len(frames) < _LEAST_FRAMES:
            return None
        clip = self._pixels(frames).movedim(0, 1)[None]
        with self._lock, self._told("fvd"):
            features = self._i3d(clip, rescale=True, resize=True, return_features=True)
            return np.asarray(features.flatten(1).float().cpu().numpy(), np.float32)

    def _pixels(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """[n, 3, height, width], 0..255."""
        return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float().to(self.device)

    def _told(self, name: str) -> "_CallErrors":
        return _CallErrors(name)


class _CallErrors:
    """Within the block, a module that takes other arguments is told as the user's file, not as a bug."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (RuntimeError, TypeError)):
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--{self.name}: the file cannot be called as expected ({reason}); it takes {_WHERE[self.name]}"
            ) from error
