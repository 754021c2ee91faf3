"""What a curation run is: sources, splitting, thresholds, captions, tokens, publication, and the means to do it."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from lumos.compression import CELL, num_latent_frames
from lumos.config import TokenizerConfig, require
from pipelines.data.settings import (
    CaptionConfig,
    DecodeConfig,
    FeatureConfig,
    LooksConfig,
    ResourceConfig,
    SourceConfig,
    SplitConfig,
    Thresholds,
)
from pipelines.data.snapshot.schemas import MODEL_SCORES
from pipelines.data.snapshot.write import PublishConfig
from pipelines.data.steps.decide import bounds, is_share


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """What is encoded of a kept clip, and how."""

    fps: float = 12.0
    num_frames: tuple[int, ...] = (
        25,
        49,
        97,
        177,
    )  # allowed lengths, each 1 + 4k: the longest that fits; with 1, images too
    sizes: tuple[str, ...] | None = None  # allowed sizes, WIDTHxHEIGHT, or none for buckets by area
    area: int = (
        352 * 352
    )  # px at most; sizes are the largest multiples of ``multiple`` within it, of several aspect ratios
    multiple: int = 32  # px
    batch_size: int = 1  # clips in one call of the encoder, always of this very shape (filled up where fewer are left)
    decode_back_share: float = 0.01  # of the clips whose codes are decoded again, for the score psnr
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.fps > 0, f"fps must be positive, got {self.fps}")
        require(bool(self.num_frames), "num_frames is empty; name at least one length, such as 25")
        for count in self.num_frames:
            num_latent_frames(count)
        require(
            self.multiple > 0 and self.multiple % CELL == 0,
            f"multiple must be a multiple of {CELL}, got {self.multiple}",
        )
        require(self.area >= self.multiple**2, f"area must be at least {self.multiple}^2 px, got {self.area}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(0 <= self.decode_back_share <= 1, f"decode_back_share must be in [0, 1], got {self.decode_back_share}")
        require(self.sizes is None or bool(self.sizes), "sizes is empty; name sizes such as 448x256, or none")
        for width, height in self.frame_sizes:
            require(
                width % CELL == 0 and height % CELL == 0, f"sizes must be multiples of {CELL} px, got {width}x{height}"
            )

    @property
    def frame_sizes(self) -> tuple[tuple[int, int], ...]:
        """The allowed (width, height), px."""
        if self.sizes is not None:
            return tuple(_parse_size(size) for size in self.sizes)
        return area_buckets(self.area, self.multiple)


def _parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"sizes are WIDTHxHEIGHT, such as 448x256, got {text!r}")
    return int(width), int(height)


def area_buckets(area: int, multiple: int, max_aspect: float = 3.0) -> tuple[tuple[int, int], ...]:
    """Frame sizes (width, height) of about the same area and different aspect ratios.

    Args:
        area: px that no size exceeds.
        multiple: px that divides every width and height.
        max_aspect: of the longer to the shorter side.
    """
    cells = area // multiple**2
    sizes = set()
    rows = 1
    for columns in range(cells, 0, -1):  # along the edge of what fits: from widest to tallest
        while True:
            if max(columns, rows) <= max_aspect * min(columns, rows):
                sizes.add((columns * multiple, rows * multiple))
            if columns * (rows + 1) > cells:
                break
            rows += 1
    return tuple(sorted(sizes))


# What has to be named for a score by a model.
_FILES = {
    "text_area": "text_detector",
    "aesthetic": "aesthetic_head",
    "nsfw": "nsfw_head",
    "similarity": "clip.weights",
}


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """One curation run: videos in, a published snapshot of token shards out."""

    KIND: ClassVar[str] = "curate"

    dataset: str  # folder or s3:// prefix that holds the stages' tables and the snapshots
    source: SourceConfig
    split: SplitConfig = field(default_factory=SplitConfig)
    thresholds: Thresholds = field(default_factory=Thresholds)
    near_duplicates: float | None = 0.99  # cosine of fingerprints from which clips count as the same; none: keep all
    looks: LooksConfig = field(default_factory=LooksConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    progress: bool = True  # bars on stderr

    def __post_init__(self) -> None:
        """Check that there is a place to write to, and that something can be kept."""
        require(bool(self.dataset), "dataset is empty; name a folder or an s3:// prefix to write to")
        cosine = self.near_duplicates
        require(cosine is None or 0 < cosine <= 1, f"near_duplicates must be a cosine in (0, 1], got {cosine}")
        for field_ in fields(self.thresholds):
            _, _, score = field_.name.partition("_")
            require(
                score not in MODEL_SCORES
                or score in self.features.scores
                or getattr(self.thresholds, field_.name) is None,
                f"thresholds.{field_.name} needs a score that nothing computes: name the file in "
                f"features.{_FILES.get(score)}, or set thresholds.{field_.name}=null",
            )
        for key, count in self._frames_wanted().items():
            require(
                count <= self.looks.num_frames,
                f"{key} {count} is more than looks.num_frames {self.looks.num_frames}, which are decoded of each clip: "
                f"raise looks.num_frames, or lower {key}",
            )
        self._check_possible()

    @property
    def reads_looks(self) -> bool:
        """Whether anything reads looks, so that they have to be made."""
        return (
            self.looks.always or bool(self.features.scores) or bool({"coca", "endpoint"} & {*self.captions.captioners})
        )

    def _frames_wanted(self) -> dict[str, int]:
        """How many frames of each clip are looked at, by the key that says so."""
        wanted = {"features.num_frames": self.features.num_frames} if self.features.scores else {}
        if "endpoint" in self.captions.captioners:
            wanted["captions.endpoint.num_frames"] = self.captions.endpoint.num_frames
        return wanted

    def _check_possible(self) -> None:
        """Refuse settings that no clip can meet."""
        for name, low, high in bounds(self.thresholds):
            told = f"thresholds.min_{name} {low} is above thresholds.max_{name} {high}"
            require(low is None or high is None or low <= high, f"{told}: nothing could be kept")
            for which, value in (("min", low), ("max", high)):
                inside = value is None or not is_share(name) or 0 <= value <= 1
                require(inside, f"thresholds.{which}_{name} must be in 0..1, as the score is, got {value}")
        shortest = min((count for count in self.tokens.num_frames if count > 1), default=None)
        if shortest is None:  # images alone
            return
        longest, least = self.split.max_seconds, self.thresholds.min_duration
        require(
            least is None or longest >= least,
            f"split.max_seconds {longest} is below thresholds.min_duration {least}: nothing could be kept",
        )
        require(
            longest * self.tokens.fps + 0.01 >= shortest,
            f"split.max_seconds {longest} at tokens.fps {self.tokens.fps:g} is fewer than the {shortest} frames of the "
            "shortest allowed clip (tokens.num_frames): nothing could be kept",
        )
