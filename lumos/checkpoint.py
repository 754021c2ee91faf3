"""Checkpoints as folders: safetensors in the authors' key names, whole or sharded, beside a ``config.json``.

``config.json`` holds the release's keys and, under ``lumos``, what the release has no key for: format version,
vocabulary, rope variant, and the :class:`ModelInfo`. A released Lumos-1 folder has no such section and loads with the
release's own settings. Format 1 had the model info as an untyped dict, ``extra``; it is still read.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.config import ModelConfig, SamplingConfig, TokenizerInfo, from_release_config, to_release_config
from lumos.decoder import Decoder
from lumos.head import join_weights
from lumos.json_values import merge, read_dataclass
from lumos.layout import PromptTemplate
from lumos.vocabulary import Vocabulary

FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEXT_TOKENIZER_FILE = "text_tokenizer.json"
_IGNORED_PREFIX = "model.vqmodel."  # the release's unused Chameleon VQ-VAE


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model folder says of its model besides weights and shape: how it was trained and how it is best sampled.

    Raises:
        ValueError: if a value is out of range; the message names it.
    """

    prompt_template: PromptTemplate = "caption"  # of the texts it was trained on
    motion_prefix: bool = False  # whether those texts say how much moves (``layout.motion_prompt``)
    shapes: tuple[tuple[int, int, int], ...] = ()  # latent (t, h, w) it was trained on; empty: unknown
    fps: float | None = None  # frames per second of the videos it was trained on; None: unknown
    tokenizer: TokenizerInfo | None = None  # that made the codes it was trained on; None: unknown
    text_tokenizer_hash: str | None = None  # ``TextTokenizer.hash`` of the one it was trained with; None: unknown
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # recommended; by default the release's
    dataset_digest: str | None = None  # of the snapshot it was trained on
    train_config: dict[str, Any] = field(default_factory=dict)  # resolved config of the run that trained it
    unknown: dict[str, Any] = field(default_factory=dict)  # keys that other programs added, kept as they are

    def __post_init__(self) -> None:
        if any(size < 1 for shape in self.shapes for size in shape):
            raise ValueError(f"shapes must be positive (t, h, w), got {list(self.shapes)}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be positive, got {self.fps}")

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, unknown keys in their places again; what is not known is left out."""
        plain = {key: value for key, value in asdict(self).items() if value is not None and key != "unknown"}
        return merge(plain, self.unknown)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelInfo":
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: if a value is of another type or out of range; the message names the key and the value.
        """
        unknown: dict[str, Any] = {}
        return replace(read_dataclass(cls, raw, "info", unknown), unknown=unknown)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: Decoder
    vocabulary: Vocabulary
    info: ModelInfo

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Decoder,
    vocabulary: Vocabulary,
    *,
    state: Mapping[str, Tensor] | None = None,
    info: ModelInfo | None = None,
    text_tokenizer: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint folder, complete or not at all: it is built beside ``path`` and renamed.

    Args:
        path: the folder; replaced where it holds a checkpoint already.
        model: weights are written in their own dtype.
        vocabulary: stored with the model.
        state: weights from elsewhere, in place of the model's own, named as its parameters or by the authors' keys; a
            mapping that reads each when it is asked for is never in memory as a whole.
        info: how it was trained and is best sampled.
        text_tokenizer: text of the JSON file of the tokenizer that prompts need; kept beside the weights.
        max_shard_bytes: weights beyond this are split into several files with an index.

    Raises:
        ValueError: if vocabulary and model differ in size.
        FileExistsError: if ``path`` is a folder that holds something else.
    """
    config = model.config
    if config.vocab_size != vocabulary.vocab_size:
        raise ValueError(f"the model has {config.vocab_size} token rows, the vocabulary {vocabulary.vocab_size} ids")
    target = Path(path)
    if target.exists() and not (target / CONFIG_FILE).exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds files that are not a checkpoint: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    section = {
        "format_version": FORMAT_VERSION,
        "vocabulary": asdict(vocabulary),
        "rope": config.rope,
        "position_scale": list(config.position_scale),
        "info": (info or ModelInfo()).to_dict(),
    }
    raw = {"architectures": ["LumosForConditionalGeneration"], **to_release_config(config), "lumos": section}
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        building.chmod(0o755)
        weights = dict(model.named_parameters()) if state is None else state
        whole = weights if "lm_head.weight" in weights else join_weights(weights, model.lm_head)
        _write_weights(building, whole, max_shard_bytes)
        (building / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
        if text_tokenizer is not None:
            (building / TEXT_TOKENIZER_FILE).write_text(text_tokenizer, encoding="utf-8")
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(old / "old")
            building.rename(target)
            shutil.rmtree(old)
        else:
            building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write weights in files of limited size, holding those of one file at a time."""
    files: list[list[str]] = []  # keys in each
    shard: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        file = folder / str(len(files))
        save_file(shard, file, {"format": "pt"})
        file.chmod(0o644)  # safetensors lets nobody else read it
        files.append(list(shard))
        shard.clear()

    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        if shard and size + tensor.nbytes > max_shard_bytes:
            close()
            size = 0
        shard[key] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    close()
    if len(files) == 1:
        (folder / "0").rename(folder / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / str(number)).rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def is_model_file(name: str) -> bool:
    """Whether a file in a checkpoint folder is one that :func:`save_checkpoint` writes."""
    return name in (CONFIG_FILE, INDEX_FILE, TEXT_TOKENIZER_FILE) or name.endswith(".safetensors")


def read_config(path: str | os.PathLike[str]) -> tuple[ModelConfig, Vocabulary, ModelInfo]:
    """Model config, vocabulary and info of a checkpoint folder, without its weights.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if its config cannot be used; the message says why.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        lacks = f"it has no {CONFIG_FILE}" if file.parent.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"{path} is not a checkpoint: {lacks}. Name the folder that `lumos train` exported, "
            "or that of a released Lumos-1 checkpoint"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is no JSON object; is this a Lumos-1 checkpoint?")
    return parse_config(raw, str(file))


def parse_config(raw: dict[str, Any], file: str) -> tuple[ModelConfig, Vocabulary, ModelInfo]:
    """Model config, vocabulary and info in the values of a ``config.json``; ``file`` is for messages.

    Raises:
        ValueError: if it cannot be used; the message says why.
    """
    config = from_release_config(raw)
    try:
        config, vocabulary, info = _read_section(raw.get("lumos"), config)
    except KeyError as error:
        raise ValueError(f"{file}: the section lumos lacks {error}; was it written by `lumos train`?") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: lumos: {error}") from error
    if config.vocab_size != vocabulary.vocab_size:
        raise ValueError(f"{file}: vocab_size {config.vocab_size} does not fit a vocabulary of {vocabulary.vocab_size}")
    return replace(config, visual_start=vocabulary.visual_start), vocabulary, info


def _read_section(raw: Any, config: ModelConfig) -> tuple[ModelConfig, Vocabulary, ModelInfo]:
    """What the section ``lumos`` adds to the release's own keys."""
    # A released checkpoint brings no section of ours; it was trained with the question as its prompt.
    released = ModelInfo(prompt_template="lumos1")
    if raw is None:
        return config, Vocabulary.lumos1(), released
    version = raw["format_version"]
    if version > FORMAT_VERSION:
        raise ValueError(
            f"it has checkpoint format {version}, this program reads up to {FORMAT_VERSION}: install the lumos-ray "
            "that wrote it or a newer one (pip install --upgrade lumos-ray)"
        )
    if version == 1:
        info = ModelInfo.from_dict(raw["extra"]) if raw.get("extra") else released
    else:
        info = ModelInfo.from_dict(raw["info"])
    config = replace(config, rope=raw["rope"], position_scale=tuple(raw["position_scale"]))
    return config, Vocabulary(**raw["vocabulary"]), info


def load_checkpoint(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Load a checkpoint folder of ours or a released one, in eval mode.

    Raises:
        FileNotFoundError: if the folder, its config or a weights file is missing.
        ValueError: if weights are missing, unexpected, of another shape, or a file is damaged; the message names them.
    """
    config, vocabulary, info = read_config(path)
    with torch.device("meta"):
        model = Decoder(config)
    # As `to_empty` does, but asking tensors of the meta device for others imports sympy.
    model._apply(  # type: ignore[no-untyped-call]
        lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device=device)
    )
    load_weights(model, path)
    return Checkpoint(model=model.eval(), vocabulary=vocabulary, info=info)


def check_weights(path: str | os.PathLike[str]) -> None:
    """Read a checkpoint folder's weights and compare names and shapes with its config, keeping nothing.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`.
    """
    with torch.device("meta"):
        model = Decoder(read_config(path)[0])
    load_weights(model, path)


def load_weights(model: Decoder, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a checkpoint folder into a model, cast to its dtype.

    Raises:
        FileNotFoundError: if a weights file is missing.
        ValueError: if weights are missing, unexpected, of another shape, or a file is damaged.
    """
    missing: dict[str, list[Tensor]] = {}
    for part, key, _ in model.weight_parts():
        missing.setdefault(key, []).append(part.detach())
    problems = []
    for key, tensor in _read_weights(Path(path)):
        if key.startswith(_IGNORED_PREFIX):
            continue
        ours = missing.pop(key, None)
        if ours is None:
            problems.append(f"{key} is not in the model")
            continue
        shape = [sum(len(part) for part in ours), *ours[-1].shape[1:]]
        if shape != list(tensor.shape):
            problems.append(f"{key} has shape {list(tensor.shape)}, the model {shape}")
            continue
        for part, rows in zip(ours, tensor.split([len(part) for part in ours]), strict=True):
            part.copy_(rows)
    problems += [f"{key} is missing" for key in missing]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {path} do not fit the model: {'; '.join(problems[:3])}{more}. "
            "Load them with the config they were saved with"
        )


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    index = folder / INDEX_FILE
    names = [WEIGHTS_FILE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}): copy it again") from error
    for name in names:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the checkpoint is incomplete, copy it again")
        try:
            with safe_open(file, framework="pt") as archive:
                for key in archive.keys():  # noqa: SIM118 (a safetensors archive is not a dict)
                    yield key, archive.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again") from error
