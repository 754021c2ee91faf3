"""Prompts and sizes to the sampler's requests, and in words what a model cannot do."""

from typing import Any

import numpy as np

from lumos.compression import VideoSize, num_latent_frames
from lumos.config import SamplingConfig
from lumos.folder import ModelFolder
from lumos.guidance import GenerationRequest
from lumos.layout import header_tokens, motion_prompt, prompt_text, video_layout
from lumos.tokenizers import TextTokenizer


class SizeError(ValueError):
    """A video that no prompt is short enough for."""


class RequestEncoder:
    """Turns what is asked of a model into requests of the sampler; needs no weights."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self._text = TextTokenizer.load(folder.text_tokenizer)

    def size(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> VideoSize:
        """The size asked for, completed from the first that the model was trained on.

        Raises:
            ValueError: if the model cannot write it, or has no default for what is left out; the message names the
                value and the nearest that would do.
        """
        values: dict[str, Any] = {"width": width, "height": height, "num_frames": num_frames, "fps": fps}
        for name, value in values.items():
            if value is None:
                if self.folder.default_size is None:
                    raise ValueError(
                        f"{name} is not given and the model {self.folder.path} names no size it was trained on"
                    )
                values[name] = getattr(self.folder.default_size, name)
        self._check_pixels("width", values["width"])
        self._check_pixels("height", values["height"])
        self._check_frames(values["num_frames"], values["fps"])
        return VideoSize(**values)

    def _check_pixels(self, name: str, value: int) -> None:
        unit, limit = self.folder.vocabulary.grid_unit, self.folder.vocabulary.max_number
        if value < 1 or value % unit:
            below = max(unit, value - value % unit)
            raise ValueError(
                f"{name} {value} is not a multiple of {unit} px, the model's grid unit: use {below} or {below + unit}"
            )
        if value > unit * limit:
            raise ValueError(f"{name} {value} is more than the {unit * limit} px the model can write")

    def _check_frames(self, num_frames: int, fps: float) -> None:
        num_latent_frames(num_frames)
        limit = self.folder.vocabulary.max_number
        if not 1 <= round(fps) <= limit:
            raise ValueError(f"fps {fps:g} is outside 1..{limit}, what the model can write")
        if num_frames > limit * fps:
            raise ValueError(
                f"num_frames {num_frames} at {fps:g} fps last longer than {limit} s, the most the model can write"
            )

    def encode(
        self,
        prompt: str,
        *,
        size: VideoSize,
        seed: int,
        sampling: SamplingConfig,
        given: np.ndarray | None = None,
        motion: int | None = None,
    ) -> GenerationRequest:
        """The request as the sampler takes it, with the template around the prompt that the model was trained with.

        ``size`` is that of the whole video, ``given`` codes [t, h, w] of the frames to continue. ``motion`` says
        how much is to move, 0 (nothing) to 9, to a model that was trained with it.

        Raises:
            SizeError: if the video alone is longer than the model's context.
            ValueError: if the prompt is empty, prompt and video are longer than the model's context, or motion is
                nothing that the model knows.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if motion is not None:
            if not self.folder.info.motion_prefix or size.num_frames == 1:
                why = "it is of videos, num_frames is 1" if self.folder.info.motion_prefix else "it was trained without"
                raise ValueError(f"motion {motion} asked of the model {self.folder.name}: {why}; leave motion out")
            prompt = motion_prompt(prompt, motion)
        text_ids = self._text.encode(prompt_text(self.folder.prompt_template, prompt, size))
        shape = size.latent_shape
        header = header_tokens(self.folder.vocabulary, text_ids, num_latents=shape[0], fps=size.fps)
        length, limit = video_layout(len(header), shape).length, self.folder.config.max_seq_len
        if length - len(text_ids) >= limit:  # whatever the prompt
            raise SizeError(
                f"{size} alone make {length - len(text_ids)} tokens, the model takes {limit}: use fewer frames or a "
                "smaller size"
            )
        if length > limit:
            raise ValueError(
                f"{size} and a prompt of {len(text_ids)} tokens make {length} tokens, the model takes {limit}: use a "
                "shorter prompt, fewer frames or a smaller size"
            )
        return GenerationRequest(text_ids=text_ids, shape=shape, fps=size.fps, seed=seed, config=sampling, given=given)
