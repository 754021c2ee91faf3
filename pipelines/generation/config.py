"""What a bulk run and an HTTP service are told: which model, how to draw, on what, and what to write or listen to."""

import ipaddress
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal

from lumos.config import SamplingConfig, require
from lumos.layout import PromptTemplate
from pipelines.media import VideoFormat

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Size of the videos; what is left out is the first size the model was trained on."""

    width: int | None = None  # px
    height: int | None = None  # px
    num_frames: int | None = None  # 1 + 4k; 1 is an image
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height", "num_frames", "fps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class SamplingChoice:
    """How videos are drawn (``lumos.config.SamplingConfig``); what is left out is as the model's folder recommends."""

    num_steps: int | None = None
    guidance_scale: float | None = None
    history_ratio: float | None = None
    temperature: float | None = None
    release_temperature: bool | None = None
    release_given_frames: bool | None = None

    def __post_init__(self) -> None:
        self.over(SamplingConfig())

    def over(self, recommended: SamplingConfig) -> SamplingConfig:
        """The settings of a run, completed from what its model recommends."""
        return replace(recommended, **{key: value for key, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The video tokenizer that turns codes into frames; by default the kind and weights the checkpoint names."""

    kind: Literal["fsq", "cosmos"] | None = None
    path: str | None = None  # weights; None is those in the package


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """The processes that hold the model."""

    num_replicas: int = 1
    num_cpus: float = 1.0  # reserved in Ray for each; may be a fraction
    num_gpus: float = 0.0
    threads: int | None = None  # torch threads of each; None shares the node's cores among the replicas
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where num_gpus > 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(self.num_replicas >= 1, f"num_replicas must be at least 1, got {self.num_replicas}")
        require(self.num_cpus >= 0, f"num_cpus must not be negative, got {self.num_cpus}")
        require(self.num_gpus >= 0, f"num_gpus must not be negative, got {self.num_gpus}")
        require(self.threads is None or self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        require(
            self.device != "cuda" or self.num_gpus > 0,
            f"device is cuda but num_gpus is {self.num_gpus}: reserve a GPU, or a share of one, for each replica",
        )

    @property
    def torch_device(self) -> Literal["cpu", "cuda"]:
        """Where a replica computes."""
        if self.device == "auto":
            return "cuda" if self.num_gpus > 0 else "cpu"
        return self.device


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a replica gathers requests of one size, frame count and number of steps."""

    max_size: int = 8  # videos drawn together
    wait_ms: float = 20.0  # longest a request waits for company while the model is idle
    max_queued: int = 64  # requests that may wait for the model; further ones are refused

    def __post_init__(self) -> None:
        require(self.max_size >= 1, f"max_size must be at least 1, got {self.max_size}")
        require(self.wait_ms >= 0, f"wait_ms must not be negative, got {self.wait_ms}")
        require(
            self.max_queued >= self.max_size,
            f"max_queued ({self.max_queued}) must be at least max_size ({self.max_size}), or no batch can fill",
        )


@dataclass(frozen=True, kw_only=True)
class ModelRunConfig:
    """What bulk runs and the service share: the model and how it is run."""

    model: str  # folder that `lumos train` exported, or of a released Lumos-1 checkpoint
    video: SizeConfig = field(default_factory=SizeConfig)
    sampling: SamplingChoice = field(default_factory=SamplingChoice)
    tokenizer: TokenizerSource = field(default_factory=TokenizerSource)
    text_tokenizer: str | None = None  # a Hugging Face tokenizers JSON; None is text_tokenizer.json beside the model
    prompt_template: PromptTemplate | None = None  # None is the one the model was trained with
    motion: int | None = None  # how much is to move, 0..9, for a model that was trained with data.motion_prefix
    format: VideoFormat = "mp4"  # png only for images (num_frames = 1)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        require(bool(self.model.strip()), "model is empty: name the folder of an exported checkpoint")
        require(self.motion is None or 0 <= self.motion <= 9, f"motion must be in 0..9, got {self.motion}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelRunConfig):
    """A bulk run: a set of prompts, some seeds for each, and a folder of videos."""

    KIND: ClassVar[str] = "generate"

    prompts: str | tuple[str, ...]  # a txt, csv, jsonl or parquet file (column prompt; seed, id optional), or a list
    output: str  # folder or s3:// prefix
    seed: int = 0  # first sampling seed of prompts that have none of their own
    seeds_per_prompt: int = 1  # videos per prompt, with successive seeds

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output.strip()), "output is empty: name a folder for the videos")
        require(self.seeds_per_prompt >= 1, f"seeds_per_prompt must be at least 1, got {self.seeds_per_prompt}")
        require(0 <= self.seed <= MAX_SEED - self.seeds_per_prompt, f"seed must be in 0..2^63-1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelRunConfig):
    """A service: the model behind HTTP."""

    KIND: ClassVar[str] = "serve"

    host: str = "127.0.0.1"  # any other than a loopback address needs a token
    port: int = 8000
    token: str | None = None  # asked of clients as a bearer token; None: the environment's LUMOS_SERVE_TOKEN, if set
    timeout_s: float = 600.0  # longest a request may take, its waiting included
    body_timeout_s: float = 10.0  # longest the body of a request may take to arrive
    max_open_bodies: int = 256  # bodies that may be arriving, more than clients send at once; else the oldest gets 503
    max_steps: int = 200  # most sampling steps a client may ask for

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.port <= 65535, f"port must be in 1..65535, got {self.port}")
        require(self.timeout_s > 0, f"timeout_s must be positive, got {self.timeout_s}")
        require(self.body_timeout_s > 0, f"body_timeout_s must be positive, got {self.body_timeout_s}")
        require(self.max_open_bodies >= 1, f"max_open_bodies must be at least 1, got {self.max_open_bodies}")
        require(self.max_steps >= 1, f"max_steps must be at least 1, got {self.max_steps}")
        require(self.token is None or bool(self.token.strip()), "token is empty: leave it out, or set a secret")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may resolve to anything
            return False
