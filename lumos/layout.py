"""Where text and frames lie in a token sequence: built with the sequence, never recovered by scanning it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from lumos.compression import CELL, VideoSize, num_source_frames
from lumos.vocabulary import Vocabulary

FRAME_HEADER = 3  # frame start, height token, width token
TAIL = 2  # tokens of a training sample after its last frame: video end, turn end
PromptTemplate = Literal["caption", "lumos1"]
# Scores from which on motion is of level 1, 2, ... 9. Prompts that models were trained on hold these levels: they stay.
_MOTION_BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.6)


@dataclass(frozen=True)
class FrameSpan:
    """One latent frame: start token, two size tokens, ``rows`` rows of ``cols`` codes and a row end, end token."""

    start: int  # index of the frame-start token
    rows: int
    cols: int  # visual columns, the row-end column not counted
    bidirectional: bool = True  # False: attended causally, as a frame outside the video markers is

    @property
    def grid_start(self) -> int:
        """Index of the first grid token."""
        return self.start + FRAME_HEADER

    @property
    def grid_size(self) -> int:
        """Number of grid tokens, row ends included."""
        return self.rows * (self.cols + 1)

    @property
    def length(self) -> int:
        """Number of tokens, markup included."""
        return self.grid_size + FRAME_HEADER + 1

    @property
    def stop(self) -> int:
        """Index after the frame-end token."""
        return self.start + self.length


@dataclass(frozen=True)
class Segment:
    """Queries ``start..stop-1`` attend to all keys before ``stop``, or, if ``causal``, each to keys up to itself."""

    start: int
    stop: int
    causal: bool


@dataclass(frozen=True)
class SequenceLayout:
    """Spans of one document of ``length`` tokens. Documents of equal layouts can be attended together."""

    length: int
    frames: tuple[FrameSpan, ...] = ()

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The document cut into causal stretches and bidirectional frames, in order."""
        segments: list[Segment] = []
        position = 0
        for frame in self.frames:
            if not frame.bidirectional:
                continue
            if frame.start > position:
                segments.append(Segment(position, frame.start, causal=True))
            segments.append(Segment(frame.start, frame.stop, causal=False))
            position = frame.stop
        if position < self.length:
            segments.append(Segment(position, self.length, causal=True))
        return tuple(segments)

    @cached_property
    def without_tail(self) -> "SequenceLayout":
        """The document up to the end of its last frame, if it has any."""
        return SequenceLayout(self.frames[-1].stop, self.frames) if self.frames else self

    @cached_property
    def frame_index(self) -> Int64[Tensor, " tokens"]:
        """The 0-based frame that every token lies in; 0 outside of frames."""
        index = torch.zeros(self.length, dtype=torch.int64)
        for number, frame in enumerate(self.frames):
            index[frame.start : frame.stop] = number
        return index

    @cached_property
    def grid_index(self) -> Int64[Tensor, "frames cells"]:
        """Index of every grid token, row ends included. All frames must have one size.

        Raises:
            ValueError: if frames differ in size.
        """
        if not self.frames:
            return torch.zeros(0, 0, dtype=torch.int64)
        sizes = {(frame.rows, frame.cols) for frame in self.frames}
        if len(sizes) > 1:
            raise ValueError(f"frames of one document must have one size, got {sorted(sizes)}")
        starts = torch.tensor([frame.grid_start for frame in self.frames])
        return starts[:, None] + torch.arange(self.frames[0].grid_size)

    @property
    def visual_index(self) -> Int64[Tensor, "frames codes"]:
        """Index of every visual token: :attr:`grid_index` without the row ends."""
        if not self.frames:
            return self.grid_index
        cells = self.grid_index.reshape(len(self.frames), self.frames[0].rows, -1)
        return cells[:, :, :-1].flatten(1)


def prompt_text(template: PromptTemplate, caption: str, size: VideoSize) -> str:
    """The text in front of a video: the caption alone, or the question that the Lumos-1 release asks."""
    if template == "caption":
        return caption
    if template == "lumos1":
        return (
            f"Generate a video with a resolution of {size.width}x{size.height}, consisting of {size.num_frames} frames "
            f"at {round(size.fps)} frames per second, according to the following prompt:\n {caption}"
        )
    raise ValueError(f"unknown prompt template {template!r}; known: caption, lumos1")


def motion_level(share: float) -> int:
    """The level 0..9 of a motion score: the share of the picture that changes from one look to the next."""
    return bisect_right(_MOTION_BOUNDS, share)


def motion_prompt(caption: str, level: int) -> str:
    """A caption that says how much moves; level 0 is as good as nothing, 9 nearly everything."""
    if not 0 <= level <= len(_MOTION_BOUNDS):
        raise ValueError(f"motion {level} is outside 0..{len(_MOTION_BOUNDS)}")
    return f"motion {level}: {caption}"


def frame_tokens(vocabulary: Vocabulary, cells: np.ndarray) -> Int64[Tensor, " length"]:
    """Tokens of one frame: markup around the ids [rows, cols] of its cells.

    Raises:
        ValueError: if the frame is not a whole number of grid units, or larger than the vocabulary can write.
    """
    rows, cols = cells.shape
    unit = vocabulary.cells_per_unit
    if rows % unit or cols % unit:
        raise ValueError(
            f"a frame of {cols * CELL}x{rows * CELL} px is not a whole number of {vocabulary.grid_unit} px grid units"
        )
    header = [vocabulary.frame_start, vocabulary.number(rows // unit), vocabulary.number(cols // unit)]
    grid = np.pad(cells, ((0, 0), (0, 1)), constant_values=vocabulary.row_end)
    return torch.from_numpy(np.concatenate([header, grid.ravel(), [vocabulary.frame_end]]))


def header_tokens(
    vocabulary: Vocabulary, text_ids: Sequence[int], *, num_latents: int, fps: float, drop_text: bool = False
) -> Int64[Tensor, " length"]:
    """Everything before the first frame: BOS, text, turn end, video start, duration and fps.

    With ``drop_text`` only the part from the video start on: the unconditional prompt of guidance.
    """
    duration = max(1, round(num_source_frames(num_latents) / fps))
    video = [vocabulary.video_start, vocabulary.number(duration), vocabulary.number(round(fps))]
    if drop_text:
        return torch.tensor(video)
    bad = [i for i in text_ids if not 0 <= i < vocabulary.text_vocab_size]
    if bad:
        raise ValueError(f"text id {bad[0]} is outside 0..{vocabulary.text_vocab_size - 1}: another text tokenizer?")
    return torch.tensor([vocabulary.bos, *text_ids, vocabulary.turn_end, *video])


def build_sequence(
    vocabulary: Vocabulary, text_ids: Sequence[int], codes: np.ndarray, *, fps: float, drop_text: bool = False
) -> tuple[Int64[Tensor, " length"], SequenceLayout]:
    """A training sample and its layout (model.md, section 2).

    Args:
        vocabulary: the token ids to write in.
        text_ids: the encoded prompt, without BOS.
        codes: visual codes [t, h, w], 0..codebook_size-1.
        fps: frames per second of the source frames.
        drop_text: leave out everything before the video start (a caption dropped for guidance).

    Raises:
        ValueError: if a code, a text id, or a size cannot be written in this vocabulary.
    """
    if codes.ndim != 3:
        raise ValueError(f"codes must have the shape [t, h, w], got {list(codes.shape)}")
    header = header_tokens(vocabulary, text_ids, num_latents=len(codes), fps=fps, drop_text=drop_text)
    frames = [frame_tokens(vocabulary, cells) for cells in vocabulary.visual(codes)]
    ids = torch.cat([header, *frames, torch.tensor([vocabulary.video_end, vocabulary.turn_end])])
    return ids, video_layout(len(header), codes.shape, tail=TAIL)


def video_layout(header: int, shape: tuple[int, int, int], *, tail: int = 0) -> SequenceLayout:
    """Layout of ``header`` tokens, frames of codes of the shape (t, h, w), and ``tail`` tokens."""
    t, h, w = shape
    length = FrameSpan(0, h, w).length
    frames = tuple(FrameSpan(header + i * length, h, w) for i in range(t))
    return SequenceLayout(length=header + t * length + tail, frames=frames)


def parse(vocabulary: Vocabulary, ids: Sequence[int] | np.ndarray | Tensor) -> SequenceLayout:
    """Layout of a foreign token sequence, found by its frame-start and size tokens.

    Where both video markers occur, a frame outside them is causal, as in the release (model.md, section 5).

    Raises:
        ValueError: if a frame is cut off by the end of the sequence.
    """
    tokens = [int(token) for token in ids]
    marked = vocabulary.video_start in tokens and vocabulary.video_end in tokens
    inside = not marked
    frames: list[FrameSpan] = []
    i = 0
    while i < len(tokens):
        if marked and tokens[i] in (vocabulary.video_start, vocabulary.video_end):
            inside = tokens[i] == vocabulary.video_start
        if tokens[i] != vocabulary.frame_start:
            i += 1
            continue
        if i + FRAME_HEADER > len(tokens):
            raise ValueError(f"the frame at token {i} is cut off by the end of the sequence ({len(tokens)} tokens)")
        rows, cols = (
            (tokens[i + k] - vocabulary.number_base) * vocabulary.cells_per_unit for k in range(1, FRAME_HEADER)
        )
        frame = FrameSpan(i, rows, cols, bidirectional=inside)
        if frame.stop > len(tokens):
            raise ValueError(f"the frame at token {i} is cut off by the end of the sequence ({len(tokens)} tokens)")
        frames.append(frame)
        i = frame.stop
    return SequenceLayout(length=len(tokens), frames=tuple(frames))
