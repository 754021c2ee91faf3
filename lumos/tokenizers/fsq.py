"""Our own video tokenizer: a causal autoencoder with finite scalar quantisation (FSQ, arXiv 2309.15505), 4x8x8.

Frame 1 alone, then groups of 4 frames, are cut into 8x8 px cells; each cell becomes one token. The encoder works at
the resolution of the cells and sees one group, no other, and of it one cell and as many neighbours as its config says,
so equal content gives equal tokens wherever and whenever it occurs. The decoder sees neighbouring cells and earlier
groups, and may end with blocks on cells of half the size, which draw detail across the borders of cells. Latents are
normalised by running statistics before they are rounded: without that, training collapses to one code.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lumos.compression import CELL, COMPRESSION, TEMPORAL_FACTOR
from lumos.tokenizers.video import check_codes, check_frames, frames_to_unit, unit_to_frames

FsqKind = Literal["fsq", "fsq-footage"]
# The weights in the package by kind; the README.md beside them says what made them, and of which material.
EMBEDDED_WEIGHTS: Mapping[FsqKind, Path] = {
    "fsq": Path(__file__).parent / "weights" / "fsq.safetensors",
    "fsq-footage": Path(__file__).parent / "weights" / "fsq_footage.safetensors",
}
MAX_CODEBOOK_SIZE = 65_536  # codes are stored as uint16

FORMAT = "lumos-fsq-2"
_OLD_FORMATS = ("lumos-fsq-1",)  # without decoder_size and the refining blocks
_HEADER_KEY = "lumos"
_PATCH = CELL * CELL * 3  # values of one cell of one frame
_FINE_CELL = CELL // 2  # px, of the refining blocks


@dataclass(frozen=True, kw_only=True)
class FsqConfig:
    """Sizes of an FSQ autoencoder."""

    levels: tuple[int, ...] = (8, 5, 5, 5)  # values each latent dimension is rounded to; their product: codebook size
    hidden_size: int = 192  # channels of encoder and decoder
    decoder_size: int | None = None  # of the decoder, where it is to be of another width
    encoder_blocks: int = 2  # residual blocks before quantisation
    # How many of those, from the last, see the neighbouring cells; with none, equal cells get equal codes whatever is
    # beside them.
    context_blocks: int = 0
    decoder_blocks: int = 4  # residual blocks after it; all see the neighbouring cells
    # How many of those, from the first, also see the previous group; the decoder's memory reaches as many groups back.
    # Train on clips of more groups than that, or longer videos decode badly.
    memory_blocks: int = 2
    expansion: int = 2  # width of a block's inner layer in multiples of its channels
    refine_blocks: int = 0  # residual blocks on cells of 4 px at the end of the decoder; they see the neighbouring ones
    refine_size: int = 96  # their channels

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels is {list(self.levels)}; every latent dimension needs at least 2 levels")
        if self.codebook_size > MAX_CODEBOOK_SIZE:
            raise ValueError(f"levels is {list(self.levels)}: {self.codebook_size} codes, over {MAX_CODEBOOK_SIZE}")
        for name in ("hidden_size", "decoder_size", "encoder_blocks", "decoder_blocks", "expansion", "refine_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.refine_blocks < 0:
            raise ValueError(f"refine_blocks is {self.refine_blocks}; it must not be negative")
        for name, limit in (("context_blocks", self.encoder_blocks), ("memory_blocks", self.decoder_blocks)):
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in 0..{limit}")

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return math.prod(self.levels)


class Block(nn.Module):
    """A ConvNeXt-style residual block on cells: depthwise 3x3 over neighbours and the previous group, then an MLP."""

    def __init__(self, size: int, inner: int, *, spatial: bool, temporal: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mix = nn.Conv2d(size, size, 3, padding=1, groups=size) if spatial else None
        self.past = nn.Conv2d(size, size, 3, padding=1, groups=size, bias=False) if temporal else None
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size)

    def forward(self, x: Float[Tensor, "batch t h w channels"]) -> Float[Tensor, "batch t h w channels"]:
        """Mix and transform; group i of the result depends on groups i - 1 and i of `x`."""
        y = self.norm(x)
        mixed = y if self.mix is None else _per_frame(self.mix, y)
        if self.past is not None and y.shape[1] > 1:
            before = _per_frame(self.past, y[:, :-1])
            mixed = mixed + F.pad(before, (0, 0, 0, 0, 0, 0, 1, 0))
        result: Tensor = x + self.down(F.gelu(self.up(mixed), approximate="tanh"))
        return result


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    images = rearrange(x, "b t h w c -> (b t) c h w")
    mixed: Tensor = layer(images)
    return rearrange(mixed, "(b t) c h w -> b t h w c", b=x.shape[0])


class FsqAutoencoder(nn.Module):
    """Frames in -1..1 to codes and back; everything about an FSQ tokenizer that has weights."""

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.config = config
        size, inner = config.hidden_size, config.hidden_size * config.expansion
        dims = len(config.levels)
        self.embed_first = nn.Linear(_PATCH, size)
        self.embed = nn.Linear(_PATCH * TEMPORAL_FACTOR, size)
        self.encoder = nn.ModuleList(
            Block(size, inner, spatial=index >= config.encoder_blocks - config.context_blocks, temporal=False)
            for index in range(config.encoder_blocks)
        )
        self.encoder_norm = nn.LayerNorm(size)
        self.to_latent = nn.Linear(size, dims)
        self.latent_norm = nn.BatchNorm1d(dims, affine=False)
        wide = config.decoder_size or size
        self.from_latent = nn.Linear(dims, wide)
        self.decoder = nn.ModuleList(
            Block(wide, wide * config.expansion, spatial=True, temporal=index < config.memory_blocks)
            for index in range(config.decoder_blocks)
        )
        self.decoder_norm = nn.LayerNorm(wide)
        self.cell = CELL  # px, of what the last layer draws
        if config.refine_blocks:
            self.cell, fine = _FINE_CELL, config.refine_size
            self.split = nn.Linear(wide, fine * (CELL // _FINE_CELL) ** 2)
            self.refine = nn.ModuleList(
                Block(fine, fine * config.expansion, spatial=True, temporal=False) for _ in range(config.refine_blocks)
            )
            self.refine_norm = nn.LayerNorm(fine)
            wide = fine
        pixels = self.cell**2 * 3
        self.unembed_first = nn.Linear(wide, pixels)
        self.unembed = nn.Linear(wide, pixels * TEMPORAL_FACTOR)
        levels = torch.tensor(config.levels)
        self.levels: Tensor
        self.strides: Tensor
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", torch.cumprod(levels, 0) // levels, persistent=False)
        # Latents come out of the norm with unit variance whatever their scale; a code's place is learned from here.
        nn.init.normal_(self.from_latent.weight, std=1.0)

    def encode_latents(self, frames: Float[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch t h w dims"]:
        """Latents spread over -1..1 in each dimension, not yet rounded."""
        patches = rearrange(frames, "b n (h p) (w q) c -> b n h w (p q c)", p=CELL, q=CELL)
        groups = rearrange(patches[:, 1:], "b (t f) h w d -> b t h w (f d)", f=TEMPORAL_FACTOR)
        x = torch.cat([self.embed_first(patches[:, :1]), self.embed(groups)], dim=1)
        for block in self.encoder:
            x = block(x)
        latents = self.to_latent(self.encoder_norm(x))
        normalised = self.latent_norm(latents.reshape(-1, latents.shape[-1])).view_as(latents)
        # Close to the normal distribution's own quantiles, so that every level is about equally often used.
        return torch.tanh(0.8 * normalised)

    def decode_latents(self, latents: Float[Tensor, "batch t h w dims"]) -> Float[Tensor, "batch time height width 3"]:
        """Frames from rounded latents; about -1..1, not clipped."""
        x = self.from_latent(latents)
        for block in self.decoder:
            x = block(x)
        x = self.decoder_norm(x)
        if self.config.refine_blocks:
            half = CELL // self.cell
            x = rearrange(self.split(x), "b t h w (p q c) -> b t (h p) (w q) c", p=half, q=half)
            for block in self.refine:
                x = block(x)
            x = self.refine_norm(x)
        cell = {"p": self.cell, "q": self.cell}
        first = rearrange(self.unembed_first(x[:, :1]), "b t h w (p q c) -> b t (h p) (w q) c", **cell)
        rest = rearrange(
            self.unembed(x[:, 1:]), "b t h w (f p q c) -> b (t f) (h p) (w q) c", f=TEMPORAL_FACTOR, **cell
        )
        return torch.cat([first, rest], dim=1)

    def latents_to_codes(self, latents: Float[Tensor, "batch t h w dims"]) -> Int64[Tensor, "batch t h w"]:
        """Index of the code nearest to each latent."""
        steps = torch.floor((latents + 1) * 0.5 * self.levels).clamp(min=0).minimum(self.levels - 1)
        codes: Tensor = (steps.long() * self.strides).sum(-1)
        return codes

    def codes_to_latents(self, codes: Int64[Tensor, "batch t h w"]) -> Float[Tensor, "batch t h w dims"]:
        """The rounded latents that codes stand for."""
        steps = (codes[..., None] // self.strides) % self.levels
        return (steps + 0.5) * 2 / self.levels - 1


class FsqTokenizer:
    """A `VideoTokenizer` over a trained FSQ autoencoder; it computes in float32.

    Attributes:
        kind: Under which it is found again; of a file of one's own it says no more.
        metadata: What the file says of itself, among it the config that trained it.
    """

    compression = COMPRESSION

    def __init__(self, path: str | Path | None = None, *, kind: FsqKind = "fsq", device: str = "cpu") -> None:
        """Load a weights file, or for None the embedded one of a kind.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no file of FSQ weights.
        """
        file = EMBEDDED_WEIGHTS[kind] if path is None else Path(path)
        self.kind: str = kind
        self.device = torch.device(device)
        model, self.metadata = load_weights(file)
        self.weights_hash = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.codebook_size = model.config.codebook_size

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Int64[Tensor, "batch t h w"]:
        """As `VideoTokenizer.encode`."""
        check_frames(frames)
        latents = self.model.encode_latents(frames_to_unit(frames.to(self.device)))
        return self.model.latents_to_codes(latents).cpu()

    @torch.inference_mode()
    def decode(self, codes: Int64[Tensor, "batch t h w"]) -> UInt8[Tensor, "batch time height width 3"]:
        """As `VideoTokenizer.decode`."""
        check_codes(codes, self.codebook_size)
        latents = self.model.codes_to_latents(codes.to(self.device).long())
        return unit_to_frames(self.model.decode_latents(latents)).cpu()


def save_weights(path: str | Path, model: FsqAutoencoder, metadata: dict[str, Any]) -> None:
    """Write an autoencoder as a .safetensors file of 16-bit floats that carries its config and JSON-able metadata.

    The file appears whole or not at all. Load it back before measuring it: weights are rounded to float16.
    """
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    # One entry: safetensors writes several in an order that changes from run to run, and the hash with it.
    about = {"format": FORMAT, "config": asdict(model.config), "metadata": metadata}
    header = {_HEADER_KEY: json.dumps(about, sort_keys=True)}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    # Not save_file, whose files only their owner may read.
    partial.write_bytes(save({name: value.contiguous().cpu() for name, value in tensors.items()}, metadata=header))
    partial.replace(target)


def load_weights(path: str | Path) -> tuple[FsqAutoencoder, dict[str, Any]]:
    """Read what `save_weights` wrote: the autoencoder in float32, and the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of FSQ weights, or its tensors do not fit its config.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"FSQ weights {file} is not a file; name a .safetensors file made by `lumos tokenizer train`, or none for "
            "the weights in the package"
        )
    try:
        with safe_open(str(file), framework="pt") as reader:
            about = json.loads((reader.metadata() or {}).get(_HEADER_KEY, "{}"))
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a dict
        if about.get("format") not in (FORMAT, *_OLD_FORMATS):
            raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r} or an older one")
        values = about["config"]
        model = FsqAutoencoder(FsqConfig(**{**values, "levels": tuple(values["levels"])}))
        model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
        metadata: dict[str, Any] = about["metadata"]
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no FSQ weights: {error}; make some with `lumos tokenizer train`") from error
    return model, metadata
