"""The face of the library: load a model folder, generate videos from prompts.

model = lumos.load("lumos-demo/train/export")
frames = model.generate("a red square moves left over a blue background", seed=7)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, TypeAlias, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from lumos.checkpoint import ModelInfo, load_checkpoint
from lumos.compression import TEMPORAL_FACTOR, VideoSize, num_latent_frames, parse_size
from lumos.config import SamplingConfig, ShortcutConfig, TokenizerKind
from lumos.encoder import RequestEncoder
from lumos.folder import ModelFolder, open_folder
from lumos.guidance import GenerationRequest
from lumos.layout import PromptTemplate
from lumos.pictures import fit_frames
from lumos.sampling import FrameCallback
from lumos.sampling import generate as draw_codes
from lumos.tokenizers import load_video_tokenizer

_MAX_BATCH = 8  # videos drawn together

Seeds: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | NDArray[Any]  # whole numbers of Python and NumPy


class SamplingOptions(TypedDict, total=False):
    """Fields of :class:`lumos.config.SamplingConfig`; what is left out is as the model's folder recommends."""

    num_steps: int
    guidance_scale: float
    history_ratio: float
    temperature: float
    draw_temperature: float
    release_temperature: bool
    release_given_frames: bool
    shortcuts: ShortcutConfig | None


class VideoOptions(SamplingOptions, total=False):
    """Keywords of :meth:`Model.generate` besides seed."""

    size: str | tuple[int, int] | None
    num_frames: int | None
    fps: float | None
    image: Any
    clip: Any
    motion: int | None


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    prompt_template: PromptTemplate | None = None,
    text_tokenizer: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    tokenizer_kind: TokenizerKind | None = None,
    compile: bool = False,
) -> "Model":
    """Load a folder that `lumos train` exported, or one of a released Lumos-1 checkpoint.

    Args:
        path: the folder.
        device: None is a GPU where there is one, else the CPU.
        dtype: of the weights; on CPU in float32 a video depends on nothing but its own request.
        prompt_template: None is the one the model was trained with.
        text_tokenizer: a Hugging Face tokenizers JSON; None is text_tokenizer.json in the folder.
        tokenizer: weights of the video tokenizer; None is those of its kind in the package. A released checkpoint needs
            the folder with the encoder.jit and decoder.jit of Cosmos-Tokenizer-DV4x8x8.
        tokenizer_kind: None is the kind that the model was trained with; for a released one cosmos.
        compile: what lies around attention by ``torch.compile``, once for all sizes; the first video waits for that.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing; the message says which, and what to do.
        ValueError: if a file is damaged, or a tokenizer is not the one that the model was trained with.
    """
    folder = open_folder(
        path,
        prompt_template=prompt_template,
        text_tokenizer=text_tokenizer,
        tokenizer=tokenizer,
        tokenizer_kind=tokenizer_kind,
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Model(folder, device=device, dtype=dtype, compile=compile)


class Model:
    """A model with its tokenizers, loaded; :func:`load` makes one.

    Attributes:
        folder: Where it came from.
        decoder: The network.
        tokenizer: The video tokenizer.
        encoder: Prompts and sizes to requests.
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.folder = folder
        self.encoder = RequestEncoder(folder)
        self.decoder = load_checkpoint(folder.path, device=device, dtype=dtype).model
        if compile:
            self.decoder.compile_blocks()
        self.tokenizer = load_video_tokenizer(replace(folder.video_tokenizer, device=str(device)))

    @property
    def info(self) -> ModelInfo:
        """How it was trained, and how it is best sampled."""
        return self.folder.info

    def __repr__(self) -> str:
        weights = self.decoder.lm_head.visual
        parameters = f"{self.folder.config.num_parameters / 1e6:.1f} M parameters"
        size = self.folder.default_size or "of no known size"
        return f"<lumos.Model {self.folder.name}: {parameters} on {weights.device}, videos {size}>"

    @overload
    def generate(
        self, prompt: str, *, seed: SupportsIndex = 0, **options: Unpack[VideoOptions]
    ) -> NDArray[np.uint8]: ...

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], *, seed: Seeds = 0, **options: Unpack[VideoOptions]
    ) -> list[NDArray[np.uint8]]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        seed: Seeds = 0,
        size: str | tuple[int, int] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        image: Any = None,
        clip: Any = None,
        motion: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Videos of prompts: uint8 frames [T, H, W, 3] for one prompt, a list of them for a list of prompts.

        Args:
            prompt: one text or several.
            seed: of the draws; with several prompts one for all, or one for each. Equal requests give equal videos,
                here, from `lumos generate` and from the service.
            size: (width, height) in px, or "WIDTHxHEIGHT"; None is the model's own.
            num_frames: frames of the video, those given included; 1 is an image. None is what the model was trained on.
            fps: frames per second to draw for; None is the rate that the model was trained on.
            image: uint8 [H, W, 3], RGB, the first frame of the video; of another size, it is cut to the video's
                shape at its centre and scaled, as crops for training are (:func:`lumos.pictures.fit_frames`).
            clip: uint8 [T, H, W, 3], RGB, T = 1 + 4k, the first frames of the video; likewise.
            motion: how much is to move, 0 (nothing) to 9, of a model trained with ``data.motion_prefix``.
            sampling: see :class:`SamplingOptions`.

        Raises:
            ValueError: if the model cannot draw this; the message names the argument and what would do.
        """
        given = _given_frames(image, clip)
        width, height = parse_size(size) if isinstance(size, str) else size or (None, None)
        full = self.encoder.size(width=width, height=height, num_frames=num_frames, fps=fps)
        codes = None if given is None else self._encode_given(given, full)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = _seeds(seed, len(prompts))
        config: SamplingConfig = replace(self.info.sampling, **sampling)
        requests = [
            self.encoder.encode(text, size=full, seed=number, sampling=config, given=codes, motion=motion)
            for text, number in zip(prompts, seeds, strict=True)
        ]
        videos = [
            frames
            for start in range(0, len(requests), _MAX_BATCH)
            for frames in self.draw(requests[start : start + _MAX_BATCH])
        ]
        return videos[0] if isinstance(prompt, str) else videos

    def draw(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_frame: FrameCallback | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> list[NDArray[np.uint8]]:
        """Frames of requests that fit in one batch (see :func:`lumos.sampling.generate`), decoded one at a time.

        Raises:
            ValueError: if they do not fit together or the model.
        """
        videos = draw_codes(self.decoder, self.folder.vocabulary, requests, on_frame=on_frame, on_step=on_step)
        return [self.tokenizer.decode(torch.from_numpy(codes)[None])[0].cpu().numpy() for codes in videos]

    def encode_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes [t, h, w] of frames [1 + 4k, H, W, 3]."""
        return self.tokenizer.encode(torch.tensor(frames)[None])[0].numpy()

    def _encode_given(self, frames: NDArray[np.uint8], size: VideoSize) -> NDArray[np.int64]:
        if len(frames) >= size.num_frames:
            raise ValueError(
                f"{len(frames)} frames are given and num_frames is {size.num_frames}: set num_frames to "
                f"{len(frames) + TEMPORAL_FACTOR} or more"
            )
        return self.encode_frames(fit_frames(frames, (size.width, size.height)))


def _seeds(seed: Any, count: int) -> list[int]:
    """One seed for each of so many prompts, NumPy's integers as Python's."""
    each = [seed] * count if np.ndim(seed) == 0 else list(seed)
    if not all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in each):
        raise ValueError(f"seed must be a whole number, or one for each prompt, got {seed!r:.60}")
    if len(each) != count:
        raise ValueError(f"seed has {len(each)} numbers for {count} prompts: give one, or one for each")
    return [int(number) for number in each]


def _given_frames(image: Any, clip: Any) -> NDArray[np.uint8] | None:
    if image is None and clip is None:
        return None
    if image is not None and clip is not None:
        raise ValueError("image and clip are both given: a video begins with one of them")
    name, shape, frames = ("image", "[H, W, 3]", image) if clip is None else ("clip", "[T, H, W, 3]", clip)
    frames = np.asarray(frames.cpu() if isinstance(frames, torch.Tensor) else frames)
    if frames.dtype != np.uint8 or frames.ndim != shape.count(",") + 1 or frames.shape[-1] != 3:
        raise ValueError(f"{name} must be uint8 {shape} with values 0..255, got {frames.dtype} {list(frames.shape)}")
    frames = frames if clip is not None else frames[None]
    if 0 in frames.shape[1:]:
        raise ValueError(f"{name} has no pixels: {list(frames.shape)}")
    try:
        num_latent_frames(len(frames))
    except ValueError as error:
        raise ValueError(f"clip: {error}") from error
    return frames
