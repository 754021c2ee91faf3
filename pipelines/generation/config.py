"""What a bulk run and an HTTP service are told: which model, how to draw, on what, and what to write or listen to."""

import ipaddress
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lumos.config import SamplingChoice as SamplingChoice
from lumos.config import TokenizerKind, require
from lumos.layout import PromptTemplate
from pipelines.benchmark_names import BENCHMARK_NAMES, BenchmarkName
from pipelines.config import ClusterConfig
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
class TokenizerSource:
    """The video tokenizer that turns codes into frames; by default the kind and weights the checkpoint names."""

    kind: TokenizerKind | None = None
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
    compile: bool = False  # by torch.compile, which the first batch waits for

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
    """How a replica gathers requests of one size, frame count, number of steps and number of given frames."""

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

    REMEDIES: ClassVar[dict[str, str]] = {
        "model": "give --model DIR (or model=DIR), a folder that `lumos train` exported",
        "prompts": "give --prompt TEXT (or prompts=FILE)",
    }

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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(bool(self.model.strip()), "model is empty: name the folder of an exported checkpoint")
        require(self.motion is None or 0 <= self.motion <= 9, f"motion must be in 0..9, got {self.motion}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelRunConfig):
    """A bulk run: a set of prompts, some seeds for each, and a folder of videos."""

    KIND: ClassVar[str] = "generate"

    # A txt, csv, jsonl or parquet file (column prompt; seed, id, image, clip optional), a list, or a benchmark's file.
    prompts: str | tuple[str, ...]
    output: str  # folder or s3:// prefix
    seed: int = 0  # first sampling seed of prompts that have none of their own
    seeds_per_prompt: int = 1  # videos per prompt, with successive seeds; a benchmark's layout says itself how many
    image: str | None = None  # picture that videos begin with, of prompts that name none of their own
    clip: str | None = None  # video that they continue, likewise
    # Names and folders that a benchmark's own code reads; prompts is then its file: VBench_full_info.json,
    # vbench2_i2v_full_info.json, VBench2_full_info.json or evaluation_metadata.jsonl.
    layout: Literal["files", BenchmarkName] = "files"
    images: str | None = None  # folder of VBench-I2V's pictures: data/crop, or one ratio of it
    long_prompts: str | None = None  # texts to draw from (txt, a line per entry of prompts); names keep the short ones

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output.strip()), "output is empty: name a folder for the videos")
        require(self.seeds_per_prompt >= 1, f"seeds_per_prompt must be at least 1, got {self.seeds_per_prompt}")
        require(0 <= self.seed <= MAX_SEED - self.seeds_per_prompt, f"seed must be in 0..2^63-1, got {self.seed}")
        require(self.image is None or self.clip is None, "image and clip are both set: a video begins with one of them")
        if self.layout == "files":
            for name in ("images", "long_prompts"):
                require(getattr(self, name) is None, f"{name} is of benchmarks: set layout to one of {BENCHMARK_NAMES}")
            return
        named = f"layout {self.layout}"
        require(isinstance(self.prompts, str), f"{named}: prompts must be the path of the benchmark's file")
        require(self.seeds_per_prompt == 1, f"{named} says how many videos a prompt has: set seeds_per_prompt to 1")
        require(self.image is None and self.clip is None, f"{named} takes neither image nor clip")
        suffix = "png" if self.layout == "geneval" else "mp4"
        require(self.format == suffix, f"{named} wants .{suffix} files: set format to {suffix}")
        if self.layout == "vbench-i2v":
            require(self.images is not None, f"{named} needs images, the folder of its pictures (data/crop)")
        else:
            require(self.images is None, f"images is of layout vbench-i2v, this is {self.layout}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelRunConfig):
    """A service: the model behind HTTP."""

    KIND: ClassVar[str] = "serve"

    models: dict[str, str] = field(default_factory=dict)  # further models by name: their folders, served alike
    host: str = "127.0.0.1"  # any other than a loopback address needs a token
    port: int = 8000
    token: str | None = None  # bearer token, or several parted by commas; None: LUMOS_SERVE_TOKEN, if set
    rate_per_minute: int | None = None  # requests for work that each token, or address, may send; None: no limit
    timeout_s: float = 600.0  # longest a direct request may take, its waiting included
    body_timeout_s: float = 10.0  # longest the body of a request may take to arrive
    max_open_bodies: int = 256  # bodies that may be arriving, more than clients send at once; else the oldest gets 503
    max_upload_mb: int = 16  # largest body with a picture or a clip
    max_steps: int = 200  # most sampling steps a client may ask for
    max_cells: int | None = (
        None  # most latent cells of a video, (frames + 3) / 4 x width / 8 x height / 8; None: context
    )
    untrained_sizes: Literal["warn", "refuse"] = "warn"  # of videos the model was not trained on; warn: by a header
    jobs: str = "lumos-jobs"  # folder or s3:// prefix that keeps jobs and their videos
    job_timeout_s: float = 3600.0  # longest a job may take, its waiting included
    job_expiry_s: float = 86400.0  # a job and its video are kept so long
    max_jobs: int = 256  # jobs that may be open; further ones are refused
    pictures: bool = True  # a picture of each latent frame of a job, for those who watch it
    api_replicas: int = 1  # processes that speak HTTP
    max_replicas: int | None = None  # replicas of a model grow to so many with the queue; None: always num_replicas

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.port <= 65535, f"port must be in 1..65535, got {self.port}")
        for name in ("timeout_s", "body_timeout_s", "job_timeout_s", "job_expiry_s"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_open_bodies", "max_steps", "max_upload_mb", "max_jobs", "api_replicas"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate_per_minute", "max_cells"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        least = self.replicas.num_replicas
        require(
            self.max_replicas is None or self.max_replicas >= least,
            f"max_replicas ({self.max_replicas}) must be at least replicas.num_replicas ({least})",
        )
        require(bool(self.jobs.strip()), "jobs is empty: name a folder for the jobs")
        require(self.token is None or bool(self.tokens), "token is empty: leave it out, or set a secret")
        for name, folder in self.models.items():
            require(bool(name.strip() and folder.strip()), f"models: {name!r} names no folder, or has no name")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens, one for each client."""
        return tuple(part.strip() for part in (self.token or "").split(",") if part.strip())

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may resolve to anything
            return False
