"""Weights that others made: where each tensor of a checkpoint folder lies, and its values a few at a time.

A folder is one of ours, of the Lumos-1 release, of Llama or of Chameleon, in safetensors whole or sharded, local or in
an object store. Headers are read first, so names and shapes are compared before any weight is; values are read by
ranges, so no more than one piece of one tensor is ever in memory.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lumos.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from lumos.vocabulary import Vocabulary
from pipelines import storage
from pipelines.errors import UserError

PIECE = 1 << 24  # elements held at a time; a multiple of 16, see ``initialize``
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_SHOWN = 5
_IGNORED = ("model.vqmodel.",)  # Chameleon's image tokenizer, which the Lumos-1 release carries along unused
_IGNORED_ENDS = ("rotary_emb.inv_freq",)  # a constant that older Llama files hold

Family = Literal["lumos", "llama", "chameleon"]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: str  # URI
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte of the file at which its values begin


@dataclass(frozen=True)
class WeightsSource:
    """A checkpoint folder whose headers were read."""

    uri: str
    family: Family
    config: Mapping[str, Any]  # its config.json
    tensors: Mapping[str, StoredTensor]

    def read(self, key: str, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Values ``first`` to ``stop`` of a flattened tensor in pieces: the place of a piece, and the piece."""
        place = self.tensors[key]
        width = place.dtype.itemsize
        with storage.open_ranges(place.file) as file:
            file.seek(place.begin + first * width)
            for start in range(first, stop, PIECE):
                count = min(PIECE, stop - start)
                data = bytearray(file.read(count * width))
                if len(data) != count * width:
                    raise UserError(f"{place.file} ends within {key}: it is damaged, copy it again")
                yield start, torch.frombuffer(data, dtype=place.dtype)


def locate(uri: str) -> str:
    """The folder of weights that ``init_from`` names: itself, or the ``export`` in a training's output or checkpoint.

    Raises:
        UserError: if there is none.
    """
    for folder in (uri, storage.join(uri, "export")):
        if storage.exists(storage.join(folder, CONFIG_FILE)):
            return folder
    unfinished = [name for name in ("checkpoints", "engine") if storage.exists(storage.join(uri, name))]
    remedy = (
        "is a training that has exported no model yet: make a model folder of a checkpoint of it with `lumos export`"
        if unfinished
        else "is not a checkpoint: it has no config.json. Name a model folder that `lumos train` exported, one of a "
        "released Lumos-1, Llama or Chameleon checkpoint (safetensors), or the output of a finished training"
    )
    raise UserError(f"init_from: {uri} {remedy}")


def open_source(uri: str) -> WeightsSource:
    """Read the config and the headers of the weights that ``init_from`` names.

    Raises:
        UserError: if files are missing or damaged, or of a kind that is not known.
    """
    folder = locate(uri)
    config = _read_json(storage.join(folder, CONFIG_FILE))
    tensors: dict[str, StoredTensor] = {}
    index = storage.join(folder, INDEX_FILE)
    names = [WEIGHTS_FILE]
    if storage.exists(index):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"init_from: {index} is damaged (it has no weight_map): copy it again")
        names = sorted(set(weight_map.values()))
    for name in names:
        tensors |= _read_header(storage.join(folder, name))
    return WeightsSource(folder, _family(config, tensors, folder), config, tensors)


def compare(source: WeightsSource, expected: Mapping[str, tuple[int, ...]], optional: frozenset[str]) -> None:
    """Check that a folder has every tensor of a model in its shape, and no other.

    Args:
        source: the folder.
        expected: shapes that it must have, by key.
        optional: of these, the keys that may be missing.

    Raises:
        UserError: if not; the message names them.
    """
    problems = []
    for key, shape in expected.items():
        found = source.tensors.get(key)
        if found is None and key not in optional:
            problems.append(f"{key} is missing")
        elif found is not None and found.shape != shape:
            problems.append(f"{key} has shape {list(found.shape)}, the model {list(shape)}")
    problems += [f"{key} is not in the model" for key in source.tensors if key not in expected]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"init_from: the weights in {source.uri} do not fit the model: {'; '.join(problems[:_SHOWN])}{more}. Set "
            "model to the checkpoint's shape, or name another checkpoint"
        )


def _family(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], folder: str) -> Family:
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise UserError(f"init_from: {folder} has no model.embed_tokens.weight: it is no Lumos-1, Llama or Chameleon")
    if not any(".self_attn.q_norm." in key for key in tensors):
        return "llama"
    # The release says "chameleon" of itself in its config; it has the visual rows, which Chameleon has not.
    return "lumos" if "lumos" in config or embedding.shape[0] >= Vocabulary.lumos1().vocab_size else "chameleon"


def _read_header(file: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: eight bytes of length, a header in JSON, then the values."""
    try:
        with storage.open_ranges(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < _MAX_HEADER:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length))
            size = stream.seek(0, 2)
        tensors = {}
        end = 0
        for key, entry in header.items():
            if key == "__metadata__" or key.startswith(_IGNORED) or key.endswith(_IGNORED_ENDS):
                continue
            begin, stop = entry["data_offsets"]
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise ValueError(f"{key} is of type {entry['dtype']}, which is not one of {', '.join(_DTYPES)}")
            if stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{key} has {stop - begin} bytes for a shape of {list(shape)}")
            tensors[key] = StoredTensor(file, dtype, shape, 8 + length + begin)
            end = max(end, stop)
        if size < 8 + length + end:
            raise ValueError(f"it has {size} bytes of {8 + length + end}")
    except FileNotFoundError as error:
        raise UserError(f"init_from: {file} is missing: the checkpoint is incomplete, copy it again") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"init_from: {file} is damaged ({error}): copy it again") from error
    return tensors


def _read_json(file: str) -> dict[str, Any]:
    try:
        value = storage.read_json(file)
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise UserError(f"init_from: {file} cannot be read ({error}): copy it again") from error
    return value
