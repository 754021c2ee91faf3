"""What is known of a model before its weights are loaded: sizes, tokenizers, identity; and requests checked against it.

Everything a user can get wrong about a model is found here, in the driver, before Ray starts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lumos.checkpoint import TEXT_TOKENIZER_FILE, ModelInfo, load_weights, read_config
from lumos.compression import CELL, num_latent_frames, num_source_frames
from lumos.config import ModelConfig, SamplingConfig, TokenizerInfo
from lumos.decoder import Decoder
from lumos.layout import PromptTemplate, header_tokens, prompt_text, video_layout
from lumos.sampling import GenerationRequest
from lumos.tokenizers import TextTokenizer, TokenizerConfig, load_video_tokenizer
from lumos.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.generation.config import ModelRunConfig, SizeConfig
from pipelines.generation.request import VideoRequest, VideoSize


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A checkpoint folder with its tokenizers, checked and found to fit together."""

    path: str  # absolute: replicas have working folders of their own
    config: ModelConfig
    vocabulary: Vocabulary
    prompt_template: PromptTemplate
    text_tokenizer: str  # path
    video_tokenizer: TokenizerConfig
    default_size: VideoSize | None  # None where the checkpoint names no size
    sampling: SamplingConfig  # of requests that say nothing: the run's, completed from what the checkpoint recommends
    identity: dict[str, Any]  # hashes and settings on the model's side that decide a video

    @property
    def name(self) -> str:
        """Short name for listings: the last folder that says something."""
        folder = Path(self.path)
        return folder.parent.name if folder.name in ("export", "checkpoint") and folder.parent.name else folder.name


def read_card(config: ModelRunConfig) -> ModelCard:
    """Inspect the model a config names.

    Raises:
        UserError: if it is missing or damaged, or its tokenizers are missing or not those it was trained with; the
            message names both sides.
    """
    folder = Path(config.model).expanduser().resolve()
    try:
        model_config, vocabulary, info = read_config(folder)
        with torch.device("meta"):
            model = Decoder(model_config)
        load_weights(model, folder)  # names and shapes are compared; nothing is kept
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    template = config.prompt_template or info.prompt_template
    text_path, text_hash = _check_text_tokenizer(config, folder, vocabulary, info.text_tokenizer_hash)
    tokenizer, tokenizer_hash = _check_video_tokenizer(config, folder, vocabulary, info.tokenizer)
    return ModelCard(
        path=str(folder),
        config=model_config,
        vocabulary=vocabulary,
        prompt_template=template,
        text_tokenizer=text_path,
        video_tokenizer=tokenizer,
        default_size=_trained_size(info),
        sampling=config.sampling.over(info.sampling),
        identity={
            "weights": _digest(folder),
            "text_tokenizer": text_hash,
            "video_tokenizer": tokenizer_hash,
            "prompt_template": template,
            "device": config.replicas.torch_device,
            "dtype": config.replicas.dtype,
        },
    )


def _check_text_tokenizer(
    config: ModelRunConfig, folder: Path, vocabulary: Vocabulary, trained_hash: str | None
) -> tuple[str, str]:
    path = Path(config.text_tokenizer).expanduser().resolve() if config.text_tokenizer else folder / TEXT_TOKENIZER_FILE
    try:
        tokenizer = TextTokenizer.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"text_tokenizer: {error}") from error
    if tokenizer.vocab_size > vocabulary.text_vocab_size:
        raise UserError(
            f"text_tokenizer: {path} has {tokenizer.vocab_size} ids, the model {folder} has room for "
            f"{vocabulary.text_vocab_size}: name the text tokenizer it was trained with"
        )
    if trained_hash not in (None, tokenizer.hash):
        raise UserError(
            f"text_tokenizer: {path} ({tokenizer.hash}) is not the one the model {folder} was trained with "
            f"({trained_hash}): its ids mean other words; name that one"
        )
    return str(path), tokenizer.hash


def _check_video_tokenizer(
    config: ModelRunConfig, folder: Path, vocabulary: Vocabulary, trained: TokenizerInfo | None
) -> tuple[TokenizerConfig, str]:
    kind = config.tokenizer.kind or ("fsq" if trained is not None and trained.kind == "fsq" else "cosmos")
    source = config.tokenizer.path
    path = str(Path(source).expanduser().resolve()) if source else None
    try:
        tokenizer = load_video_tokenizer(TokenizerConfig(kind=kind, path=path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"tokenizer: {error}") from error
    ours = f"{kind} tokenizer {path or 'in the package'} ({tokenizer.weights_hash})"
    if trained is not None and trained.weights_hash != tokenizer.weights_hash:
        raise UserError(
            f"tokenizer: the {ours} is not the one the model {folder} was trained with, {trained.kind} "
            f"{trained.weights_hash}: its codes mean other pictures; set tokenizer.kind and tokenizer.path to that one"
        )
    if tokenizer.codebook_size != vocabulary.codebook_size:
        raise UserError(
            f"tokenizer: the {ours} has {tokenizer.codebook_size} codes, the model {folder} "
            f"{vocabulary.codebook_size}: set tokenizer.kind and tokenizer.path to the one it was trained with"
        )
    device = config.replicas.torch_device
    return TokenizerConfig(kind=kind, path=path, device=device), tokenizer.weights_hash


def _trained_size(info: ModelInfo) -> VideoSize | None:
    """The first shape the checkpoint was trained on."""
    if not info.shapes or info.fps is None:
        return None
    t, h, w = info.shapes[0]
    return VideoSize(width=w * CELL, height=h * CELL, num_frames=num_source_frames(t), fps=info.fps)


def _digest(folder: Path) -> str:
    """SHA-256 over config and weights, so that a model retrained into the same folder is another model."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.index.json")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class RequestEncoder:
    """Turns requests into the sampler's form, and says in words what a model cannot do."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self._text = TextTokenizer.load(card.text_tokenizer)

    def size(self, asked: SizeConfig) -> VideoSize:
        """The size asked for, completed from the model's own.

        Raises:
            ValueError: if the model cannot write it, or has no default for what is left out; the message names the
                key, its value and the nearest that would do.
        """
        values: dict[str, Any] = {}
        for name in ("width", "height", "num_frames", "fps"):
            value = getattr(asked, name)
            if value is None:
                if self.card.default_size is None:
                    raise ValueError(
                        f"{name} is not given and the model {self.card.path} names no size it was trained on"
                    )
                value = getattr(self.card.default_size, name)
            values[name] = value
        self._check_pixels("width", values["width"])
        self._check_pixels("height", values["height"])
        self._check_frames(values["num_frames"], values["fps"])
        return VideoSize(**values)

    def _check_pixels(self, name: str, value: int) -> None:
        unit = self.card.vocabulary.grid_unit
        if value % unit:
            below = max(unit, value - value % unit)
            raise ValueError(
                f"{name} {value} is not a multiple of {unit} px, the model's grid unit: use {below} or {below + unit}"
            )
        largest = unit * self.card.vocabulary.max_number
        if value > largest:
            raise ValueError(f"{name} {value} is more than the {largest} px the model can write")

    def _check_frames(self, num_frames: int, fps: float) -> None:
        num_latent_frames(num_frames)
        limit = self.card.vocabulary.max_number
        if not 1 <= round(fps) <= limit:
            raise ValueError(f"fps {fps:g} is outside 1..{limit}, what the model can write")
        if num_frames > limit * fps:
            raise ValueError(
                f"num_frames {num_frames} at {fps:g} fps last longer than {limit} s, the most the model can write"
            )

    def encode(self, request: VideoRequest) -> GenerationRequest:
        """The request as the sampler takes it.

        Raises:
            ValueError: if prompt and video are longer than the model's context.
        """
        size = request.size
        text = prompt_text(
            self.card.prompt_template,
            request.prompt,
            width=size.width,
            height=size.height,
            num_frames=size.num_frames,
            fps=size.fps,
        )
        text_ids = self._text.encode(text)
        t, h, w = size.latent_shape
        header = header_tokens(self.card.vocabulary, text_ids, num_latents=t, fps=size.fps)
        length = video_layout(len(header), num_latents=t, rows=h, cols=w).length
        if length > self.card.config.max_seq_len:
            raise ValueError(
                f"{size} and a prompt of {len(text_ids)} tokens make {length} tokens, the model takes "
                f"{self.card.config.max_seq_len}: use a shorter prompt, fewer frames or a smaller size"
            )
        return GenerationRequest(
            text_ids=text_ids, shape=size.latent_shape, fps=size.fps, seed=request.seed, config=request.sampling
        )
