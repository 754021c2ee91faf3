"""What a training run is: data, model, mask, optimizer, scale, checkpoints, tracking; checked before it starts."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lumos.config import MaskConfig, ModelConfig, Recompute, RopeKind, SamplingChoice, SamplingConfig, require
from lumos.vocabulary import Vocabulary
from pipelines.config import ClusterConfig, config_hash, config_to_dict
from pipelines.data.settings import OpenClipConfig
from pipelines.tracking import check_uri
from pipelines.training.data_config import DataConfig as DataConfig
from pipelines.training.data_config import MixConfig as MixConfig
from pipelines.training.data_config import SourceConfig as SourceConfig

# Keys that decide how a run is carried out and not what it computes: a run may be continued with others.
_OPERATIONAL = (
    "output",
    "num_workers",
    "min_workers",
    "micro_batch_tokens",
    "recommended_sampling",
    "sampling_choice",
    "resources",
    "checkpoint",
    "validation",
    "samples",
    "tracking",
    "diagnosis",
    "profile",
    "cluster",
    "progress",
    "deepspeed",
    "export_dtype",
    "max_skipped_in_a_row",
)
# Such keys within sections.
_OPERATIONAL_WITHIN = ("model.checkpoint_activations", "model.compile")

LEAST_PROMPTS = 8  # of which an interval says something

# Keys added later, dotted, with the value under which a run computes what it did before they were there. At that value
# they are no part of a run's identity, so runs and checkpoints of older programs go on.
ADDED: dict[str, Any] = {
    "fork_from": None,
    "ema": None,
    "optimizer.decay_steps": 0,
    "data.order": 1,
    "data.sources": [],
    "data.mix": None,
    "data.motion_prefix": False,
    "image_batch": None,
    "optimizer.text_loss_weight": 0.0,
}


def _at_least(config: Any, least: int, *names: str) -> None:
    """Check fields of a section, of which those that are none are left out."""
    for name in names:
        value = getattr(config, name)
        words = f"be at least {least}" if least else "not be negative"
        require(value is None or value >= least, f"{name} must {words}, got {value}")


def without_operational(plain: dict[str, Any]) -> dict[str, Any]:
    """A config's plain values, or an older program's identity of it, without the keys that are operational."""
    kept = {key: value for key, value in plain.items() if key not in _OPERATIONAL}
    for dotted in _OPERATIONAL_WITHIN:
        section, key = dotted.split(".")
        kept[section] = {name: value for name, value in kept[section].items() if name != key}
    return kept


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of the decoder; the number of token rows follows from the vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # a multiple of 32
    rope: RopeKind = "mm"
    rope_theta: float = 10000.0
    position_scale: tuple[int, int, int] = ModelConfig.position_scale  # the paper's; not the tokenizer's compression
    max_seq_len: int = 32768
    # Recompute blocks in the backward pass: less memory, a third more work; "selective" keeps what attention gave.
    checkpoint_activations: bool | Literal["selective"] = False
    compile: bool = False  # blocks by torch.compile, on GPUs; attention is left as it is. On a CPU nothing is compiled

    def __post_init__(self) -> None:
        self.resolve(1)

    @property
    def recompute(self) -> Recompute:
        """The same in the decoder's words."""
        if self.checkpoint_activations == "selective":
            return "selective"
        return "full" if self.checkpoint_activations else "none"

    def resolve(self, vocab_size: int, visual_start: int = 0) -> ModelConfig:
        """The model's config with its number of token rows, and which of the head's is the first of a visual code."""
        fields = {key: value for key, value in vars(self).items() if key not in ("checkpoint_activations", "compile")}
        return ModelConfig(vocab_size=vocab_size, visual_start=visual_start, **fields)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon with AdamW, and the schedule.

    A linear warm-up, then constant; or a cosine to ``min_lr_ratio``; or (wsd: warm-up, stable, decay) constant, and
    linear to ``min_lr_ratio`` over the last ``decay_steps``.

    Muon (DeepSpeed's) takes the matrices between embedding and head, AdamW the rest. It needs no clipping, since its
    updates have a set norm, and DeepSpeed would clip those updates rather than gradients.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4  # of AdamW, at its peak
    muon_lr: float = 0.02  # of Muon, at its peak: the spectral norm of an update
    muon_momentum: float = 0.95
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0  # of wsd: at its end
    min_lr_ratio: float = 0.1  # of lr, at the end of cosine and wsd
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms and embeddings have none
    clip_norm: float = 4.0  # gradients are scaled down to this global norm; 0 switches clipping off
    z_loss_weight: float = 0.0
    # Of the next-token loss of each prompt token, against 1 of a masked visual token. Above 0 the head's rows of text
    # are trained; at 0 they keep their values and take no memory of gradients and optimizer.
    text_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _at_least(
            self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm", "z_loss_weight", "text_loss_weight"
        )
        for name in ("beta1", "beta2", "muon_momentum"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        require(
            self.kind == "adamw" or self.clip_norm == 0,
            f"clip_norm is {self.clip_norm:g}; it must be 0 with kind muon, whose updates need no clipping",
        )
        require(
            (self.schedule == "wsd") == (self.decay_steps > 0),
            f"decay_steps is {self.decay_steps} with schedule {self.schedule}: it belongs to wsd, which needs it",
        )
        require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate at 0-based ``step`` of ``steps``: reaches ``lr`` at the end of the warm-up.

        A function of these alone, so a resume needs no state.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "wsd":
            left = min(1.0, (steps - step) / (self.decay_steps + 1))
            return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)
        progress = (step - self.warmup_steps) / max(1, steps - 1 - self.warmup_steps)
        low = self.lr * self.min_lr_ratio
        return low + (self.lr - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """A moving average of the weights, exported beside them."""

    decay: float = 0.9999  # share of the average that stays in one step
    start: int = 0  # 0-based step whose weights it begins with

    def __post_init__(self) -> None:
        require(0.0 <= self.decay < 1.0, f"decay must be in [0, 1), got {self.decay}")
        _at_least(self, 0, "start")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the training state is saved and how failures are survived."""

    every: int = 100  # steps
    keep: int = 2  # newest ones kept
    max_failures: int = 3  # restarts of the workers within one command
    storage: str | None = None  # folder or s3:// URI that all nodes reach, in which each run makes a folder of its own
    # named lumos-HASH; none: in the output folder
    # Local folder of every node in which checkpoints are made, and to which those of a store are fetched; none: the
    # system's temporary one.
    scratch: str | None = None
    upload: Literal["async", "sync"] = "async"  # to storage beside the training, or while it waits; the last one: sync

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep")
        _at_least(self, 0, "max_failures")


@dataclass(frozen=True, kw_only=True)
class ResourceConfig:
    """What each worker and its loader reserve of the cluster. Fractions let two workers and Ray Data share two CPUs."""

    device: Literal["cpu", "gpu"] = "cpu"
    cpus_per_worker: float = 0.5
    cpus_per_loader: float = 0.25  # one loader actor per worker
    threads_per_worker: int | None = None  # of torch; none: the machine's cores divided by the workers
    steps_per_block: int = 8  # steps a loader hands over at once
    prefetch_steps: int = 8  # steps ready in a worker before they are needed

    def __post_init__(self) -> None:
        for name in ("cpus_per_worker", "cpus_per_loader"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _at_least(self, 1, "steps_per_block", "prefetch_steps", "threads_per_worker")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    uri: str | None = None  # none: the SQLite file mlruns.db beside the output, which all runs of that folder share
    experiment: str = "lumos"
    run_name: str | None = None
    flush_seconds: float = 5.0  # metrics are sent in batches this far apart
    log_every: int = 1  # steps of one row of metrics in MLflow, by their mean; metrics.jsonl has every step
    system_metrics: bool = False  # MLflow's own of the driver's machine: processors, memory, disk, network
    peak_tflops: float | None = None  # of one device in bf16, for MFU; none: of those known by name

    def __post_init__(self) -> None:
        if self.uri is not None:
            check_uri(self.uri)
        _at_least(self, 0, "flush_seconds")
        _at_least(self, 1, "log_every")
        require(
            self.peak_tflops is None or self.peak_tflops > 0, f"peak_tflops must be positive, got {self.peak_tflops}"
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss on held-out rows, under masks and captions that are the same in every run."""

    every: int = 500  # steps, and after the last one; 0 switches it off
    rows: int = 128  # of the split, drawn by the seed; all, if there are fewer
    split: str = "val"
    seed: int = 0  # of rows and masks; its own, so that runs with other seeds compare

    def __post_init__(self) -> None:
        _at_least(self, 0, "every")
        _at_least(self, 1, "rows")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Videos drawn beside the training, by a task of its own from a checkpoint, and looked at in MLflow."""

    every: int = 0  # steps, a multiple of checkpoint.every, and after the last one; 0: none
    prompts: tuple[str, ...] = ()  # none: the first captions of held-out rows
    count: int = 4  # of such captions
    seed: int = 0  # of the first video; the next ones have the next seeds
    num_cpus: float = 1.0  # that the task reserves beside the training
    num_gpus: float = 0.0
    clip: OpenClipConfig | None = None  # measures how like their prompts the videos are; none: not measured

    def __post_init__(self) -> None:
        _at_least(self, 0, "every", "num_cpus", "num_gpus")
        _at_least(self, 1, "count")


@dataclass(frozen=True, kw_only=True)
class SamplingTrialConfig:
    """Ways to draw videos that are tried at the end, against the configured one, for the model's folder to recommend.

    The judge of the demo rates them where all prompts are its own, else CLIP (``samples.clip``).
    """

    candidates: tuple[SamplingChoice, ...]  # each a set of changes over recommended_sampling
    # At most, captions of the rows of the validation. Of two ways, one right in 30 % of the videos and one in 50 %, the
    # better is found by 32 prompts in 40 of 100 runs, by 64 in 70, by 128 in 95.
    prompts: int = 64
    seed: int = 0  # of the prompts' choice and of the first video; the next ones have the next seeds, in all ways alike

    def __post_init__(self) -> None:
        require(bool(self.candidates), "candidates is empty: name at least one, or set sampling_choice to null")
        _at_least(self, LEAST_PROMPTS, "prompts")

    def ways(self, recommended: SamplingConfig) -> tuple[SamplingConfig, ...]:
        """The configured way and then every candidate, whole.

        Raises:
            ValueError: if two are the same.
        """
        ways = (recommended, *(candidate.over(recommended) for candidate in self.candidates))
        for number, way in enumerate(ways):
            same = ways.index(way)
            what = "recommended_sampling itself" if same == 0 else f"the same as sampling_choice.candidates.{same - 1}"
            require(
                same == number, f"sampling_choice.candidates.{number - 1} is {what}: change a value, or leave it out"
            )
        return ways


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A profile by torch of some steps, in the folder ``profile`` beside the checkpoints."""

    steps: tuple[int, int] | None = None  # first and last; none: no profile
    memory: bool = False  # record allocations on a GPU; the picture is saved with the profile, or out of memory

    def __post_init__(self) -> None:
        require(
            self.steps is None or 1 <= self.steps[0] <= self.steps[1],
            f"steps must be a first and a last step from 1 on, got {self.steps}",
        )


@dataclass(frozen=True, kw_only=True)
class DiagnosisConfig:
    """What helps to find out why a run is slow or stands still."""

    phases_every: int = 10  # steps of one line of phases.jsonl, by their mean, of every worker; 0: no such lines
    hang_seconds: float = 1800.0  # a step that takes longer has the stacks of all workers written; 0: never

    def __post_init__(self) -> None:
        _at_least(self, 0, "phases_every", "hang_seconds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Raises:
        ValueError: if values do not fit together; the message names them and what to change.
    """

    KIND: ClassVar[str] = "train"
    REMOVED: ClassVar[dict[str, str]] = {
        "micro_batch": "it counted rows, and is now micro_batch_tokens: set that to micro_batch x the tokens of a row",
    }

    # Names that others give to keys, where a near one would not be found.
    ALSO_CALLED: ClassVar[dict[str, str]] = {
        "batch_size": "global_batch",
        "epochs": "steps",
        "learning_rate": "optimizer.lr",
        "lr": "optimizer.lr",
        "max_steps": "steps",
        "optimizer.learning_rate": "optimizer.lr",
    }

    output: str  # checkpoints, metrics and the export go here; a rerun continues from it
    data: DataConfig
    model: ModelShape
    mask: MaskConfig = field(default_factory=MaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig | None = None  # {decay, start}; none: no average is kept
    deepspeed: str = "zero1"  # a name in infra/deepspeed, or the path of a DeepSpeed JSON
    precision: Literal["auto", "bf16", "fp32"] = "bf16"  # auto: bf16 where the device multiplies in it
    steps: int
    global_batch: int  # rows per step, over all workers
    image_batch: int | None = None  # rows per step of images; none: global_batch
    micro_batch_tokens: int  # most tokens of a worker's forward pass, those of frames and markup; captions come on top
    num_workers: int = 1  # at most, where min_workers is set
    min_workers: int | None = None  # fewest to train with while nodes are missing; none: exactly num_workers
    seed: int = 0
    fork_from: str | None = None  # RUN@STEP or a checkpoint's folder: go on from there, with this config
    init_from: str | None = None  # an exported or released checkpoint folder to start from
    recommended_sampling: SamplingConfig = field(default_factory=SamplingConfig)  # told to all who generate with it
    sampling_choice: SamplingTrialConfig | None = None  # ways that may be told instead; none: it stays as it is
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export_dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights in the model's folder
    max_skipped_in_a_row: int = 3  # steps with a loss or gradients that are not finite; one more ends training
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    progress: bool = True  # on standard error: a bar on a terminal, else a line with the time now and then

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "global_batch", "image_batch", "micro_batch_tokens", "num_workers")
        phases = self.optimizer.warmup_steps + self.optimizer.decay_steps
        require(phases <= self.steps, f"optimizer.warmup_steps + decay_steps = {phases} exceeds steps = {self.steps}")
        both = f"fork_from = {self.fork_from} and init_from = {self.init_from}"
        require(not (self.fork_from and self.init_from), f"{both}: weights can come from one of them only")
        _at_least(self, 0, "max_skipped_in_a_row")
        require(
            self.samples.every % self.checkpoint.every == 0,
            f"samples.every = {self.samples.every} is not a multiple of checkpoint.every = {self.checkpoint.every}: "
            "videos are drawn from checkpoints",
        )
        trial = self.sampling_choice
        without = "validation.every=0" if trial is None else "sampling_choice=null and validation.every=0"
        require(
            (trial is None and not self.validation.every) or self.validation.split != self.data.split,
            f"validation.split = {self.validation.split} is trained on: name another, or set {without}",
        )
        if trial is not None:
            trial.ways(self.recommended_sampling)
            require(
                trial.prompts <= self.validation.rows,
                f"sampling_choice.prompts = {trial.prompts} exceeds validation.rows = {self.validation.rows}: they are "
                "captions of those rows",
            )
        least, most = self.num_workers if self.min_workers is None else self.min_workers, self.num_workers
        require(1 <= least <= most, f"min_workers must be from 1 to num_workers = {most}, got {least}")
        for name in ("global_batch", "image_batch"):  # of fewer workers, some may have a row more than others
            rows = getattr(self, name) or 0
            below = rows // most * most
            nearest = f"{below} and {below + most}" if below else f"{most}"
            require(
                rows == below, f"{name} = {rows} is not a multiple of num_workers = {most}; nearest that are: {nearest}"
            )

    def batch_rows(self, num_frames: int) -> int:
        """Rows of a step whose rows have so many latent frames."""
        return self.image_batch if num_frames == 1 and self.image_batch is not None else self.global_batch

    def make_vocabulary(self, *, text_vocab_size: int, codebook_size: int) -> Vocabulary:
        """The token ids of this run.

        Raises:
            ValueError: if a tokenizer does not fit the Lumos-1 layout.
        """
        if self.data.vocabulary == "compact":
            return Vocabulary.compact(text_vocab_size, codebook_size, grid_unit=self.data.grid_unit)
        vocabulary = Vocabulary.lumos1()
        if codebook_size != vocabulary.codebook_size:
            raise ValueError(
                f"data.vocabulary = lumos1 has {vocabulary.codebook_size} visual codes, the snapshot's tokenizer "
                f"{codebook_size}: use vocabulary compact, or curate with tokens.tokenizer.kind=fsq-footage, or cosmos"
            )
        if text_vocab_size > vocabulary.text_vocab_size:
            raise ValueError(
                f"the text tokenizer has {text_vocab_size} ids, the Lumos-1 vocabulary {vocabulary.text_vocab_size}: "
                "set data.text_tokenizer to the Lumos-1 text_tokenizer.json, or use vocabulary compact"
            )
        return vocabulary

    def identity(self) -> dict[str, Any]:
        """The part of the config that decides what is computed, as plain values."""
        return self._without_neutral(without_operational(config_to_dict(self)))

    def older_identity(self) -> dict[str, Any]:
        """What :meth:`identity` was while programs took how it is computed for part of what is."""
        kept = {k: v for k, v in config_to_dict(self).items() if k not in _OPERATIONAL or k == "deepspeed"}
        del kept["model"]["compile"]
        return self._without_neutral(kept)

    def _without_neutral(self, kept: dict[str, Any]) -> dict[str, Any]:
        # The digests of the snapshots stand for them, wherever they are kept.
        for named in (kept["data"], *kept["data"]["sources"]):
            del named["dataset"]
        if self.optimizer.schedule == "constant":
            del kept["steps"]  # nothing before the end depends on where it is: the run may be made longer
        for dotted, neutral in ADDED.items():
            *sections, key = dotted.split(".")
            section = kept
            for name in sections:
                section = section[name]
            if key in section and section[key] == neutral:
                del section[key]
        return kept

    def identity_hash(self) -> str:
        """16 hex digits that name what is computed."""
        return config_hash(self.identity())
