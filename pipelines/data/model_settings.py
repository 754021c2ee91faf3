"""Settings of the models that look at clips: scores and captions. Each model is off until its file is named."""

from dataclasses import dataclass, field
from typing import Literal

from lumos.config import require
from pipelines.data.endpoint_settings import EndpointConfig


@dataclass(frozen=True, kw_only=True)
class OpenClipConfig:
    """A model of open_clip, from files."""

    weights: str | None = None  # a weights file, or a folder with open_clip_config.json and weights, as on the hub
    model: str = "ViT-L-14"  # open_clip's name of the architecture; a folder names its own
    device: str = "cpu"
    batch_size: int = 8  # images in one call, always as many (filled up where fewer are left)

    def __post_init__(self) -> None:
        """Check ranges."""
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
        """Heads need features."""
        require(self.num_frames >= 1, f"num_frames must be at least 1, got {self.num_frames}")
        for name in ("aesthetic_head", "nsfw_head"):
            require(
                getattr(self, name) is None or self.clip.weights is not None,
                f"{name} needs CLIP features: name open_clip weights in clip.weights too",
            )

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that this computes."""
        on = {
            "text_area": self.text_detector,
            "aesthetic": self.aesthetic_head,
            "nsfw": self.nsfw_head,
            "similarity": self.clip.weights,
        }
        return tuple(name for name, file in on.items() if file is not None)


@dataclass(frozen=True, kw_only=True)
class CocaConfig:
    """A captioner of open_clip: the middle frame of a clip, words chosen greedily."""

    weights: str | None = None
    model: str = "coca_ViT-L-14"
    device: str = "cpu"
    batch_size: int = 8
    max_tokens: int = 40

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(1 <= self.max_tokens <= 75, f"max_tokens must be in 1..75, got {self.max_tokens}")

    @property
    def open_clip(self) -> OpenClipConfig:
        """The model."""
        return OpenClipConfig(weights=self.weights, model=self.model, device=self.device, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Where captions come from, and which are used."""

    captioners: tuple[Literal["given", "coca", "endpoint"], ...] = ("given",)  # each adds captions, in this order
    file: str | None = (
        None  # CSV, JSONL or Parquet; none: captions.{csv,jsonl,parquet} in the source folder, or sidecars
    )
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
        """Check that captioners are named once, and have what they need."""
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
