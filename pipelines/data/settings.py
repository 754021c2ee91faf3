"""Settings of the single stages. Apart from config.py, which needs torch: workers and decode children do without it."""

from dataclasses import dataclass
from typing import Literal


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with that message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the videos are."""

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

    detector: Literal["adaptive", "content", "stride", "none"] = "adaptive"
    threshold: float | None = None  # of the detector; none: PySceneDetect's own (adaptive 3.0, content 27.0)
    max_seconds: float = 15.0  # longer shots are divided evenly; with the detector "stride", the length of every clip
    width: int = 256  # px of the low-resolution frames; smaller sources keep their size

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.max_seconds > 0, f"max_seconds must be positive, got {self.max_seconds}")
        require(self.threshold is None or self.threshold > 0, f"threshold must be positive, got {self.threshold}")
        require(64 <= self.width <= 1024, f"width must be in 64..1024 px, got {self.width}")


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
    min_motion: float | None = None  # mean share of the picture that changes between looks 1/8 s apart
    min_motion_time: float | None = 0.25  # share of the time in which anything moves: a static camera with a small
    # moving subject has nearly 1, a slide that is turned now and then nearly 0


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Where captions come from: a table, or .txt files beside the videos."""

    file: str | None = (
        None  # CSV, JSONL or Parquet; none: captions.{csv,jsonl,parquet} in the source folder, or sidecars
    )
    path_column: str = "path"  # relative to the table's folder, or absolute
    caption_column: str = "caption"
    require: bool = False  # whether clips without a caption are rejected


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
class ResourceConfig:
    """What the run takes of the cluster, and how much failure it bears."""

    workers: int | None = None  # processes per stage; none: one per CPU
    cpus_per_worker: float = 1.0
    gpus_per_tokenizer: float = 0.0  # GPUs (or a share of one) that each process of the token stage holds
    max_failed_share: float = 0.5  # of the sources that may fail before the run stops, as something else is wrong then

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.workers is None or self.workers >= 1, f"workers must be at least 1, got {self.workers}")
        require(self.cpus_per_worker > 0, f"cpus_per_worker must be positive, got {self.cpus_per_worker}")
        require(self.gpus_per_tokenizer >= 0, f"gpus_per_tokenizer must not be negative, got {self.gpus_per_tokenizer}")
        require(0 <= self.max_failed_share <= 1, f"max_failed_share must be in [0, 1], got {self.max_failed_share}")
