"""The only home of token ids: the Lumos-1 layout, and compact layouts for small models and codebooks."""

from dataclasses import dataclass

import numpy as np

from lumos.compression import CELL


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token ids of text, markup, numbers and visual codes.

    A visual code ``c`` (0..codebook_size-1) has the id ``visual_start + c``; a number ``n`` (0..max_number) has the id
    ``number_base + n``. Frame sizes are written in units of ``grid_unit`` pixels.

    Raises:
        ValueError: if ids overlap or do not fit in ``vocab_size``.
    """

    bos: int
    pad: int
    frame_start: int
    frame_end: int
    row_end: int
    turn_end: int
    mask: int
    video_start: int
    video_end: int
    number_base: int
    max_number: int
    visual_start: int
    codebook_size: int
    vocab_size: int
    grid_unit: int  # pixels; a multiple of the latent cell's
    text_vocab_size: int  # text ids are 0..text_vocab_size-1

    def __post_init__(self) -> None:
        if self.visual_start + self.codebook_size > self.vocab_size:
            raise ValueError(
                f"visual ids end at {self.visual_start + self.codebook_size}, beyond vocab_size {self.vocab_size}"
            )
        if self.grid_unit <= 0 or self.grid_unit % CELL:
            raise ValueError(f"grid_unit must be a positive multiple of {CELL} px, got {self.grid_unit}")
        if self.number_base + self.max_number >= self.visual_start or self.codebook_size < 1:
            raise ValueError("number tokens must end before the visual ids, and the codebook must not be empty")

    @classmethod
    def lumos1(cls) -> "Vocabulary":
        """The layout of the Lumos-1 release (model.md, section 1)."""
        return cls(
            bos=0,
            pad=0,
            frame_start=8197,
            frame_end=8196,
            row_end=8803,
            turn_end=8710,
            mask=9003,
            video_start=9004,
            video_end=9005,
            number_base=8804,
            max_number=198,
            visual_start=65536,
            codebook_size=64000,
            vocab_size=129536,
            grid_unit=32,
            text_vocab_size=65536,
        )

    @classmethod
    def compact(
        cls, text_vocab_size: int, codebook_size: int, *, grid_unit: int = 16, max_number: int = 64
    ) -> "Vocabulary":
        """A layout with few ids: text ids 0..N-1 (0 is BOS and padding), markup, numbers, visual codes."""
        specials = ("frame_start", "frame_end", "row_end", "turn_end", "mask", "video_start", "video_end")
        ids = {name: text_vocab_size + i for i, name in enumerate(specials)}
        number_base = text_vocab_size + len(specials)
        visual_start = number_base + max_number + 1
        return cls(
            bos=0,
            pad=0,
            number_base=number_base,
            max_number=max_number,
            visual_start=visual_start,
            codebook_size=codebook_size,
            vocab_size=visual_start + codebook_size,
            grid_unit=grid_unit,
            text_vocab_size=text_vocab_size,
            **ids,
        )

    @property
    def cells_per_unit(self) -> int:
        """Latent cells along one side of a grid unit."""
        return self.grid_unit // CELL

    def number(self, value: int) -> int:
        """Id of a number token.

        Raises:
            ValueError: if the value is outside 0..max_number.
        """
        if not 0 <= value <= self.max_number:
            raise ValueError(f"number {value} is outside 0..{self.max_number}, the range this vocabulary can write")
        return self.number_base + value

    def visual(self, codes: np.ndarray) -> np.ndarray:
        """Ids of visual codes.

        Raises:
            ValueError: if a code is outside 0..codebook_size-1.
        """
        if codes.size and not (int(codes.min()) >= 0 and int(codes.max()) < self.codebook_size):
            raise ValueError(
                f"codes reach from {codes.min()} to {codes.max()}, outside 0..{self.codebook_size - 1}: "
                "were they made by another visual tokenizer?"
            )
        return codes.astype(np.int64) + self.visual_start
