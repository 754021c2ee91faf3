"""The part of a run's config that says which rows are trained on."""

import math
from dataclasses import dataclass
from typing import Literal

from lumos.compression import CELL
from lumos.config import TokenizerConfig, require
from lumos.layout import PromptTemplate


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture; either all of its sources have a weight, or none has."""

    dataset: str  # as ``DataConfig.dataset``
    weight: float | None = None  # its share of the steps, among the weights of all
    repeat: float | None = None  # how often its rows are seen while those of a source without are seen once

    def __post_init__(self) -> None:
        for name, value in (("weight", self.weight), ("repeat", self.repeat)):
            require(
                value is None or 0 < value < math.inf,
                f"{name} of {self.dataset} must be positive, got {value}; to do without it, leave the source out",
            )
        require(
            self.weight is None or self.repeat is None, f"{self.dataset} has a weight and a repeat: set one of them"
        )


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Steps of images and of videos, in what ratio; a kind that is left out is not trained on."""

    image: float | None = None
    video: float | None = None

    def __post_init__(self) -> None:
        require(self.image is not None or self.video is not None, "mix names neither image nor video: set it to null")
        for name, value in vars(self).items():
            require(
                value is None or 0 < value < math.inf,
                f"mix.{name} must be positive, got {value}; to train without that kind, leave it out",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows trained on and how their captions become text."""

    dataset: str | None = None  # a dataset (its newest snapshot) or one snapshot; local path or s3:// URI
    sources: tuple[SourceConfig, ...] = ()  # several datasets, in place of one
    split: str = "train"
    mix: MixConfig | None = None  # none: in proportion to their rows
    order: Literal[1, 2] = (
        2  # of rows: 2 reads few bytes of large datasets; 1 is that of older runs, to go on with them
    )
    tokenizer: TokenizerConfig | None = None  # the visual tokenizer the codes must come from; none: whichever it was
    text_tokenizer: str | None = None  # a Hugging Face tokenizers JSON; none: the embedded default
    vocabulary: Literal["compact", "lumos1"] = "compact"
    grid_unit: int = 16  # px, of a compact vocabulary; frame sizes must be multiples of it
    prompt_template: PromptTemplate = "caption"
    caption_drop: float = 0.1  # share of samples trained without their caption, for guidance
    motion_prefix: bool = False  # say in the prompt of a video how much moves in it, so that it can be asked for

    def __post_init__(self) -> None:
        require(
            (self.dataset is None) == bool(self.sources),
            "dataset and sources are both set: set dataset to null, or sources to []"
            if self.sources
            else "set dataset, or sources",
        )
        named = [source.dataset for source in self.sources]
        twice = next((name for name in named if named.count(name) > 1), None)
        require(twice is None, f"sources names {twice} twice: give it one entry with a higher weight or repeat")
        weighted = [source.weight is not None for source in self.sources]
        without = next((source.dataset for source in self.sources if source.weight is None), None)
        require(
            all(weighted) or not any(weighted), f"sources: {without} has no weight, others have: give all one or none"
        )
        require(0.0 <= self.caption_drop <= 1.0, f"caption_drop must be in [0, 1], got {self.caption_drop}")
        require(
            self.grid_unit > 0 and self.grid_unit % CELL == 0,
            f"grid_unit must be a positive multiple of {CELL} px, got {self.grid_unit}",
        )
