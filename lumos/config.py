"""Frozen configuration of the model, the training mask and the sampler, with the named sizes as functions."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

RopeKind = Literal["1d", "3d", "m", "mm"]
MaskKind = Literal["tube", "random", "diffusion_forcing"]
# Video tokenizers: ours for the demo (128 codes, learned from procedural video), ours for footage (64,000 codes), and
# the JIT files of NVIDIA's Cosmos tokenizer.
TokenizerKind = Literal["fsq", "fsq-footage", "cosmos"]
# What a block keeps for its backward pass: all, nothing but its input, or that and what attention gave.
Recompute = Literal["none", "selective", "full"]


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with that message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder. Defaults are those of the Lumos-1 release where it has one.

    Raises:
        ValueError: if sizes do not fit together; the message names the field and its value.
    """

    vocab_size: int  # rows of the embedding and of the head
    hidden_size: int
    intermediate_size: int  # width of the SwiGLU
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # a multiple of 32: the MM-RoPE axis table has a period of 16 frequencies
    rope_theta: float = 10000.0
    rope: RopeKind = "mm"
    # Positions per latent step along (t, h, w). Not the tokenizer's compression, though the paper gives it the same
    # numbers: a model may be trained with another scale on the same codes.
    position_scale: tuple[int, int, int] = (4, 8, 8)
    norm_eps: float = 1e-5  # RMSNorm
    qk_norm_eps: float = 1e-5  # LayerNorm of queries and keys
    model_parallel_size: int = 1  # rows of the q/k norm parameters; each serves a block of heads
    max_seq_len: int = 32768  # longest sequence, in tokens
    # The head's row of the first visual code. Rows before it are those of text, kept apart: no loss of the codes gives
    # them a gradient. 0: the head is one matrix, all of which is trained.
    visual_start: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(
            self.head_dim > 0 and self.head_dim % 32 == 0, f"head_dim must be a multiple of 32, got {self.head_dim}"
        )
        for name in ("num_heads", "num_kv_heads"):
            require(
                getattr(self, name) % self.model_parallel_size == 0,
                f"{name} {getattr(self, name)} must be a multiple of model_parallel_size {self.model_parallel_size}",
            )
        require(
            0 <= self.visual_start < self.vocab_size,
            f"visual_start must be in [0, vocab_size = {self.vocab_size}), got {self.visual_start}",
        )
        require(self.max_seq_len > 0, f"max_seq_len must be positive, got {self.max_seq_len}")
        require(self.rope_theta > 0, f"rope_theta must be positive, got {self.rope_theta}")

    @property
    def num_parameters(self) -> int:
        """Number of weights, embedding and head included."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        norms = 2 * self.hidden_size + 4 * self.model_parallel_size * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How training positions are masked (paper, AR-DF).

    ``tube`` masks one spatial pattern in every frame of a clip; ``random`` draws a pattern per frame at one ratio;
    ``diffusion_forcing`` draws ratio and pattern per frame.
    """

    kind: MaskKind = "tube"
    min_ratio: float = 0.7  # lower clip of cos(pi * u / 2), in (0, 1]

    def __post_init__(self) -> None:
        require(0.0 < self.min_ratio <= 1.0, f"min_ratio must be in (0, 1], got {self.min_ratio}")


@dataclass(frozen=True)
class TokenizerInfo:
    """What identifies the video tokenizer that made some codes."""

    kind: str  # a ``TokenizerKind``, or that of a newer program
    codebook_size: int
    compression: tuple[int, int, int]
    weights_hash: str  # equal hash, equal codes


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig:
    """Ways to draw a video in less time that change it. Each is off by default; steps count from 0 within a frame.

    Sources: Halton order, Besnier et al. 2025; guidance over an interval, Kynkäänniemi et al. 2024; cheap passes on a
    cached context, ReCAP (arXiv 2505.19089); a reused guidance difference, LazyMAR (arXiv 2503.12450).
    """

    # Which slots a step keeps: the most confident of all drawn, or the next ones, which alone are drawn then, of a
    # sequence that spreads evenly over the frame.
    order: Literal["confidence", "halton"] = "confidence"
    threshold: float | None = None  # probability, in (0, 1], from which on a code is kept whatever the schedule says
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps from and until which guidance is applied
    guidance_cache_from: float = 1.0  # share of the steps from which on the last difference of the branches is reused
    context_refresh: int = 1  # every so many steps a pass is whole; those between compute the unknown slots alone
    frame_steps: tuple[int, ...] = ()  # steps of each drawn frame in place of num_steps; the last holds for all further

    def __post_init__(self) -> None:
        require(self.order in ("confidence", "halton"), f"order must be confidence or halton, got {self.order!r}")
        require(
            self.threshold is None or 0.0 < self.threshold <= 1.0,
            f"threshold must be in (0, 1], got {self.threshold}",
        )
        require(
            self.threshold is None or self.order == "confidence",
            f"threshold is {self.threshold} with order halton, which keeps whatever it draws: leave it out",
        )
        low, high = self.guidance_interval
        require(
            0.0 <= low <= high <= 1.0,
            f"guidance_interval must be two shares of the steps in order, in [0, 1], got [{low}, {high}]",
        )
        require(
            0.0 < self.guidance_cache_from <= 1.0,
            f"guidance_cache_from must be in (0, 1], got {self.guidance_cache_from}: the first step has no earlier one",
        )
        require(self.context_refresh >= 1, f"context_refresh must be at least 1, got {self.context_refresh}")
        require(
            all(steps >= 1 for steps in self.frame_steps),
            f"frame_steps must be whole numbers of at least 1, got {list(self.frame_steps)}",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a video is drawn, frame by frame. The two ``release_*`` options reproduce quirks of the authors' code."""

    num_steps: int = 50  # mask-predict steps per latent frame
    guidance_scale: float = 15.0  # 1 means no guidance: the unconditional branch is not run
    history_ratio: float = 0.7  # share of a finished frame's cells hidden from later frames, in [0, 1]
    temperature: float = 1.0  # of the re-masking noise at the first step
    # Of the draw of a code: below 1 the likely codes are drawn more often than the model says, which the paper's
    # sampler never does. Confidence is that of the draw.
    draw_temperature: float = 1.0
    release_temperature: bool = False  # let the re-masking temperature compound over frames, as the release does
    release_given_frames: bool = False  # show given frames unmasked in the history, as the release does
    shortcuts: ShortcutConfig | None = None  # faster and approximate; none: the sampler of the paper

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}")
        require(
            0.0 <= self.guidance_scale <= 1000.0,  # beyond, float32 logits would overflow
            f"guidance_scale must be in [0, 1000], got {self.guidance_scale}",
        )
        require(0.0 <= self.history_ratio <= 1.0, f"history_ratio must be in [0, 1], got {self.history_ratio}")
        require(self.temperature >= 0.0, f"temperature must not be negative, got {self.temperature}")
        require(
            0.01 <= self.draw_temperature <= 100.0,  # beyond, float32 logits would overflow
            f"draw_temperature must be in [0.01, 100], got {self.draw_temperature}",
        )

    @property
    def passes(self) -> tuple[object, ...]:
        """What decides which passes through the model are made: requests of one batch share it."""
        short = self.shortcuts or ShortcutConfig()
        steps = (self.num_steps, *short.frame_steps)
        return (*steps, short.guidance_interval, short.guidance_cache_from, short.context_refresh)

    def steps_of(self, drawn: int) -> int:
        """Steps of a latent frame, the ``drawn``-th that is drawn, from 0."""
        listed = self.shortcuts.frame_steps if self.shortcuts else ()
        return listed[min(drawn, len(listed) - 1)] if listed else self.num_steps


@dataclass(frozen=True, kw_only=True)
class SamplingChoice:
    """Some settings of a :class:`SamplingConfig`; what is left out is as somewhere else, as in a model's folder."""

    num_steps: int | None = None
    guidance_scale: float | None = None
    history_ratio: float | None = None
    temperature: float | None = None
    draw_temperature: float | None = None
    release_temperature: bool | None = None
    release_given_frames: bool | None = None
    shortcuts: ShortcutConfig | None = None  # faster and approximate; none and none recommended: the full sampler

    def __post_init__(self) -> None:
        self.over(SamplingConfig())

    def over(self, recommended: SamplingConfig) -> SamplingConfig:
        """All settings, completed from those that are recommended; a number of steps goes before a recommended list."""
        chosen = {key: value for key, value in vars(self).items() if value is not None}
        if self.num_steps is not None and self.shortcuts is None and recommended.shortcuts is not None:
            chosen["shortcuts"] = replace(recommended.shortcuts, frame_steps=())
        return replace(recommended, **chosen)


_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "qk_norm_eps": "qk_norm_eps",
    "model_parallel_size": "model_parallel_size",
    "max_seq_len": "max_position_embeddings",
}


def to_release_config(config: ModelConfig) -> dict[str, Any]:
    """The release's ``config.json`` keys for a config; what the release has no key for is left out."""
    return {theirs: getattr(config, ours) for ours, theirs in _HF_NAMES.items()}


def from_release_config(raw: dict[str, Any]) -> ModelConfig:
    """Read the release's ``config.json`` (unknown keys are ignored: it carries many of its framework's).

    Raises:
        ValueError: if a size is missing, or a feature is asked for that Lumos-1 does not have.
    """
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "swin_norm"):
        if raw.get(name):
            raise ValueError(f"config.json: {name} = {raw[name]} is not supported; Lumos-1 checkpoints have false")
    known = {ours: raw[theirs] for ours, theirs in _HF_NAMES.items() if raw.get(theirs) is not None}
    if "head_dim" not in known and {"hidden_size", "num_heads"} <= known.keys():
        known["head_dim"] = known["hidden_size"] // known["num_heads"]
    known.setdefault("num_kv_heads", known.get("num_heads"))
    needed = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"}
    missing = sorted(_HF_NAMES[name] for name in needed - known.keys())
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; is this a Lumos-1 checkpoint?")
    return ModelConfig(**known)


def lumos_500m() -> ModelConfig:
    """The paper's 0.5B model."""
    return replace(lumos_1b(), hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=4)


def lumos_1b() -> ModelConfig:
    """The paper's 1B model (1.5 B parameters with both vocabulary matrices)."""
    return ModelConfig(
        vocab_size=129536,
        visual_start=65536,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
    )


def lumos_3b() -> ModelConfig:
    """The paper's 3B model (3.6 B parameters with both vocabulary matrices)."""
    return replace(lumos_1b(), num_layers=28, hidden_size=3072, num_heads=24, head_dim=128)


def parse_tokenizer_kind(name: str) -> TokenizerKind:
    """The kind of video tokenizer of that name, as a folder or a snapshot has it.

    Raises:
        ValueError: if there is none of that name; the message lists those there are.
    """
    kinds: tuple[TokenizerKind, ...] = get_args(TokenizerKind)
    for kind in kinds:
        if kind == name:
            return kind
    raise ValueError(f"kind is {name!r}; known tokenizers: {', '.join(kinds)}")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which video tokenizer to load."""

    kind: TokenizerKind = "fsq"
    # Its weights: for fsq and fsq-footage any file of FSQ weights (.safetensors), None for those in the package; for
    # cosmos a folder with encoder.jit and decoder.jit.
    path: str | None = None
    device: str = "cpu"  # where it computes, as torch names devices

    def __post_init__(self) -> None:
        parse_tokenizer_kind(self.kind)
