"""A model folder with its tokenizers: found, and checked to fit together before any weights are loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

from lumos.checkpoint import TEXT_TOKENIZER_FILE, ModelInfo, read_config
from lumos.compression import VideoSize
from lumos.config import ModelConfig, TokenizerKind, parse_tokenizer_kind
from lumos.layout import PromptTemplate
from lumos.tokenizers import TextTokenizer, TokenizerConfig, load_video_tokenizer
from lumos.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What there is to load, in plain values that travel between processes; see :func:`open_folder`."""

    path: str  # absolute: other processes have working folders of their own
    config: ModelConfig
    vocabulary: Vocabulary
    info: ModelInfo
    prompt_template: PromptTemplate
    text_tokenizer: str  # path
    text_tokenizer_hash: str
    video_tokenizer: TokenizerConfig
    video_tokenizer_hash: str

    @property
    def name(self) -> str:
        """Short name for listings: the last folder that says something."""
        folder = Path(self.path)
        return folder.parent.name if folder.name in ("export", "checkpoint") and folder.parent.name else folder.name

    @property
    def default_size(self) -> VideoSize | None:
        """The first shape the model was trained on; None where its folder names none."""
        if not self.info.shapes or self.info.fps is None:
            return None
        return VideoSize.of_latents(self.info.shapes[0], self.info.fps)


def open_folder(
    path: str | os.PathLike[str],
    *,
    prompt_template: PromptTemplate | None = None,
    text_tokenizer: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    tokenizer_kind: TokenizerKind | None = None,
) -> ModelFolder:
    """Inspect a folder that `lumos train` exported, or one of a released Lumos-1 checkpoint.

    The arguments are those of :func:`lumos.api.load`.

    Raises:
        FileNotFoundError: if the folder or a tokenizer is missing.
        ValueError: if the folder's config is damaged, or a tokenizer is not the one that the model was trained with;
            the message names both sides.
    """
    folder = Path(path).expanduser().resolve()
    config, vocabulary, info = read_config(folder)
    text_path = _absolute(text_tokenizer) or str(folder / TEXT_TOKENIZER_FILE)
    video_tokenizer = TokenizerConfig(kind=tokenizer_kind or _trained_kind(folder, info), path=_absolute(tokenizer))
    return ModelFolder(
        path=str(folder),
        config=config,
        vocabulary=vocabulary,
        info=info,
        prompt_template=prompt_template or info.prompt_template,
        text_tokenizer=text_path,
        text_tokenizer_hash=_check_text_tokenizer(text_path, folder, vocabulary, info),
        video_tokenizer=video_tokenizer,
        video_tokenizer_hash=_check_video_tokenizer(video_tokenizer, folder, vocabulary, info),
    )


def _trained_kind(folder: Path, info: ModelInfo) -> TokenizerKind:
    if info.tokenizer is None:  # a released checkpoint
        return "cosmos"
    try:
        return parse_tokenizer_kind(info.tokenizer.kind)
    except ValueError as error:
        raise ValueError(
            f"tokenizer: the model {folder} was trained with one that this lumos does not know: {error}; update lumos, "
            "or name kind and path of one with the same weights"
        ) from error


def _absolute(path: str | os.PathLike[str] | None) -> str | None:
    return str(Path(path).expanduser().resolve()) if path else None  # an empty text names nothing


def _check_text_tokenizer(path: str, folder: Path, vocabulary: Vocabulary, info: ModelInfo) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"text_tokenizer: {path} is not a file: name the Hugging Face tokenizers JSON file that the model {folder} "
            f"was trained with, or copy it into its folder as {TEXT_TOKENIZER_FILE}"
        )
    try:
        tokenizer = TextTokenizer.load(path)
    except ValueError as error:
        raise ValueError(f"text_tokenizer: {error}") from error
    if tokenizer.vocab_size > vocabulary.text_vocab_size:
        raise ValueError(
            f"text_tokenizer: {path} has {tokenizer.vocab_size} ids, the model {folder} has room for "
            f"{vocabulary.text_vocab_size}: name the text tokenizer it was trained with"
        )
    if info.text_tokenizer_hash not in (None, tokenizer.hash):
        raise ValueError(
            f"text_tokenizer: {path} ({tokenizer.hash}) is not the one the model {folder} was trained with "
            f"({info.text_tokenizer_hash}): its ids mean other words; name that one"
        )
    return tokenizer.hash


def _check_video_tokenizer(config: TokenizerConfig, folder: Path, vocabulary: Vocabulary, info: ModelInfo) -> str:
    try:
        tokenizer = load_video_tokenizer(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"tokenizer: {error}") from error
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from error
    ours = f"{config.kind} tokenizer {config.path or 'in the package'} ({tokenizer.weights_hash})"
    trained = info.tokenizer
    if trained is not None and trained.weights_hash != tokenizer.weights_hash:
        raise ValueError(
            f"tokenizer: the {ours} is not the one the model {folder} was trained with, {trained.kind} "
            f"{trained.weights_hash}: its codes mean other pictures; name the kind and the path of that one"
        )
    if tokenizer.codebook_size != vocabulary.codebook_size:
        raise ValueError(
            f"tokenizer: the {ours} has {tokenizer.codebook_size} codes, the model {folder} "
            f"{vocabulary.codebook_size}: name the kind and the path of the one it was trained with"
        )
    return tokenizer.weights_hash
