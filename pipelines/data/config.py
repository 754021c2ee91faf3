"""What a curation run is: sources, splitting, thresholds, captions, tokens, publication, and the means to do it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lumos.compression import CELL, num_latent_frames, parse_size
from lumos.config import TokenizerConfig, require
from pipelines.config import ClusterConfig
from pipelines.data.reasons import too_few_frames, too_small
from pipelines.data.scores import DECISIVE, Thresholds, scores_of
from pipelines.data.settings import (
    CaptionConfig,
    DecodeConfig,
    FeatureConfig,
    LooksConfig,
    PublishConfig,
    ResourceConfig,
    SourceConfig,
    SplitConfig,
)

FRAME_ROUNDING = 0.01  # of a frame, by which a span falls short that is rounded to milliseconds


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """What is encoded of a kept clip, and how."""

    fps: float = 12.0
    num_frames: tuple[int, ...] = (25, 49, 97, 177)  # allowed, each 1 + 4k: the longest that fits; with 1, images too
    sizes: tuple[str, ...] | None = None  # allowed sizes, WIDTHxHEIGHT, or none for buckets by area
    # px at most; sizes are the largest multiples of ``multiple`` within it, of several aspect ratios
    area: int = 352 * 352
    multiple: int = 32  # px
    # by which a video's picture may be scaled up to fill its size, at most; none: by as much as it takes, as an image's
    max_enlargement: float | None = 1.0
    batch_size: int = 1  # clips in one call of the encoder, always of this very shape (filled up where fewer are left)
    decode_back_share: float = 0.05  # of the clips whose codes are decoded again, for the scores psnr and ssim
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        require(self.fps > 0, f"fps must be positive, got {self.fps}")
        require(bool(self.num_frames), "num_frames is empty; name at least one length, such as 25")
        for count in self.num_frames:
            num_latent_frames(count)
        require(
            self.multiple > 0 and self.multiple % CELL == 0,
            f"multiple must be a multiple of {CELL}, got {self.multiple}",
        )
        require(self.area >= self.multiple**2, f"area must be at least {self.multiple}^2 px, got {self.area}")
        most = self.max_enlargement
        require(most is None or most > 0, f"max_enlargement must be positive, got {most}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(0 <= self.decode_back_share <= 1, f"decode_back_share must be in [0, 1], got {self.decode_back_share}")
        require(self.sizes is None or bool(self.sizes), "sizes is empty; name sizes such as 448x256, or none")
        for width, height in self.frame_sizes:
            whole = width > 0 and height > 0 and width % CELL == 0 and height % CELL == 0
            require(whole, f"sizes must be multiples of {CELL} px, got {width}x{height}")

    @property
    def shortest_video(self) -> int | None:
        """Frames of the shortest video that is encoded; None where images alone are."""
        return min((count for count in self.num_frames if count > 1), default=None)

    @property
    def frame_sizes(self) -> tuple[tuple[int, int], ...]:
        """The allowed (width, height), px."""
        if self.sizes is not None:
            return tuple(map(parse_size, self.sizes))
        return area_buckets(self.area, self.multiple)


def area_buckets(area: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Frame sizes (width, height), px, of at most an area and of different aspect ratios up to 3.

    ``multiple`` divides every width and height.
    """
    cells = area // multiple**2
    sizes = set()
    rows = 1
    for columns in range(cells, 0, -1):  # along the edge of what fits: from widest to tallest
        while True:
            if max(columns, rows) <= 3 * min(columns, rows):
                sizes.add((columns * multiple, rows * multiple))
            if columns * (rows + 1) > cells:
                break
            rows += 1
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class ClipShape:
    """What of a clip is encoded."""

    num_frames: int
    width: int  # px
    height: int


def plan_shape(scores: Mapping[str, float], config: TokenConfig) -> ClipShape | str:
    """The longest allowed length that a clip fills, at the size nearest to its aspect ratio of those that it fills.

    Of its scores, duration (s), height (px), aspect (width / height of the picture) and image are looked at. Where it
    is too short or too small, the reason is told instead.
    """
    aspect, height = scores["aspect"], scores["height"]
    available = math.floor(scores["duration"] * config.fps + FRAME_ROUNDING)
    if scores["image"]:
        lengths = [count for count in config.num_frames if count == 1]
    else:
        lengths = [count for count in config.num_frames if 1 < count <= available]
    if not lengths:
        shortest = config.shortest_video or 5
        return too_few_frames(1 if scores["image"] else available, shortest, config.fps)

    def enlargement(size: tuple[int, int]) -> float:
        return max(size[0] / (aspect * height), size[1] / height)

    def difference(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1] / aspect)), 6), -size[0] * size[1]

    most = math.inf if scores["image"] or config.max_enlargement is None else config.max_enlargement
    fitting = [size for size in config.frame_sizes if round(enlargement(size), 3) <= most]
    if not fitting:
        least = min(config.frame_sizes, key=lambda size: (round(enlargement(size), 3), difference(size)))
        return too_small(enlargement(least), most, (round(aspect * height), round(height)), least)
    return ClipShape(max(lengths), *min(fitting, key=difference))


@dataclass(frozen=True, kw_only=True)
class MovingDuplicatesConfig:
    """From which cosines on two clips in which something moves count as the same; both must be reached."""

    pictures: float = 0.9  # of fingerprints in step; a crop, a logo and another speed take from it
    motion: float | None = 0.75  # of what moves; none: near_duplicates decides alone, as where nothing moves

    def __post_init__(self) -> None:
        for name, cosine in (("pictures", self.pictures), ("motion", self.motion)):
            sound = cosine is None or 0 < cosine <= 1
            require(sound, f"moving_duplicates.{name} must be a cosine in (0, 1], got {cosine}")


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """One curation run: videos in, a published snapshot of token shards out."""

    KIND: ClassVar[str] = "curate"

    dataset: str  # folder or s3:// prefix that holds the stages' tables and the snapshots
    source: SourceConfig
    split: SplitConfig = field(default_factory=SplitConfig)
    thresholds: Thresholds = field(default_factory=Thresholds)
    # a table (CSV, JSONL, Parquet) of clips and sources that a person keeps or rejects: key, decision, note
    overrides: str | None = None
    # cosine of fingerprints from which clips count as the same where nothing moves; none: keep all
    near_duplicates: float | None = 0.99
    moving_duplicates: MovingDuplicatesConfig = field(default_factory=MovingDuplicatesConfig)  # where something does
    looks: LooksConfig = field(default_factory=LooksConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    progress: bool = True  # bars on stderr

    def __post_init__(self) -> None:
        require(bool(self.dataset), "dataset is empty; name a folder or an s3:// prefix to write to")
        cosine = self.near_duplicates
        require(cosine is None or 0 < cosine <= 1, f"near_duplicates must be a cosine in (0, 1], got {cosine}")
        for score in scores_of("features"):
            for key in (f"{which}_{score.name}" for which in score.bounds):
                require(
                    score.name in self.features.scores or getattr(self.thresholds, key) is None,
                    f"thresholds.{key} needs a score that nothing computes: name the file in features.{score.file}, or "
                    f"set thresholds.{key}=null",
                )
        for key, count in self._frames_wanted().items():
            require(
                count <= self.looks.num_frames,
                f"{key} {count} is more than looks.num_frames {self.looks.num_frames}, which are decoded of each clip: "
                f"raise looks.num_frames, or lower {key}",
            )
            require(
                self.looks.num_frames % count == 0,
                f"looks.num_frames {self.looks.num_frames} is no multiple of {key} {count}, so that these could not be "
                "evenly spaced: change one of them",
            )
        side, most = self.captions.endpoint.max_side, 2 * self.looks.shorter_side
        require(
            "endpoint" not in self.captions.captioners or side <= most,
            f"captions.endpoint.max_side {side} is more than looks have ({most} at most, twice looks.shorter_side): "
            "raise looks.shorter_side, or lower max_side",
        )
        self._check_possible()

    @property
    def bounds(self) -> Thresholds:
        """The thresholds; the least duration, unless it is set, is that of the shortest clip that is encoded."""
        shortest = self.tokens.shortest_video
        if shortest is None or getattr(self.thresholds, "min_duration", None) is not None:
            return self.thresholds
        least = math.floor(1000 * (shortest - FRAME_ROUNDING) / self.tokens.fps) / 1000
        return replace(self.thresholds, min_duration=least)

    def _frames_wanted(self) -> dict[str, int]:
        """How many frames of each clip are looked at, by the key that says so."""
        wanted = {"features.num_frames": self.features.num_frames} if self.features.scores else {}
        if "endpoint" in self.captions.captioners:
            wanted["captions.endpoint.num_frames"] = self.captions.endpoint.num_frames
        if "coca" in self.captions.captioners:
            wanted["the captioner coca, which takes the middle of"] = 2
        return wanted

    def _check_possible(self) -> None:
        """Refuse settings that no clip can meet."""
        for score in DECISIVE:
            keys = {which: f"thresholds.{which}_{score.name}" for which in ("min", "max")}
            low, high = (getattr(self.thresholds, f"{which}_{score.name}", None) for which in keys)
            possible = low is None or high is None or low <= high
            require(possible, f"{keys['min']} {low} is above {keys['max']} {high}: nothing could be kept")
            for key, value in zip(keys.values(), (low, high), strict=True):
                inside = value is None or not score.share or 0 <= value <= 1
                require(inside, f"{key} must be in 0..1, as the score is, got {value}")
        shortest = self.tokens.shortest_video
        if shortest is None:  # images alone
            return
        longest, least = self.split.max_seconds, getattr(self.thresholds, "min_duration", None)
        require(
            least is None or longest >= least,
            f"split.max_seconds {longest} is below thresholds.min_duration {least}: nothing could be kept",
        )
        require(
            longest * self.tokens.fps + FRAME_ROUNDING >= shortest,
            f"split.max_seconds {longest} at tokens.fps {self.tokens.fps:g} is fewer than the {shortest} frames of the "
            "shortest allowed clip (tokens.num_frames): nothing could be kept",
        )
