"""Prompts from a config's list or a file: txt, CSV, JSONL or Parquet."""

import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.errors import UserError, listed
from pipelines.generation.config import MAX_SEED
from pipelines.parquet import open_parquet

_REMEDY = "expected a .txt (a prompt per line), .csv, .jsonl or .parquet file with a column prompt"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to make videos of."""

    text: str
    seed: int | None = None  # sampling seed of its first video; None: the run's
    id: str | None = None  # the user's own name for it, kept in the manifest
    image: str | None = None  # picture that its videos begin with: a path, local or s3://
    clip: str | None = None  # video that they continue, likewise
    where: str = field(default="prompts", compare=False)  # file and row, for messages


def read_prompts(source: str | Sequence[str]) -> list[Prompt]:
    """The prompts of a list of texts, or of a file, in order.

    Files of rows have a column ``prompt``, and may have ``seed``, ``id``, ``image`` and ``clip``; other columns are
    ignored. Paths of pictures and clips are relative to the file. Empty lines of a text file are skipped.

    Raises:
        UserError: if the file is missing, of another kind, without that column or without prompts, or rows are wrong;
            the message names file and rows.
    """
    if not isinstance(source, str):
        if not source:
            raise UserError(f"prompts is an empty list: give texts, or the path of a file ({_REMEDY})")
        return _prompts([(f"prompts: item {i}", {"prompt": text}) for i, text in enumerate(source)], "")
    if not storage.exists(source):
        raise UserError(f"prompts: there is no file {source}; {_REMEDY}")
    suffix = source.rpartition("/")[2].rpartition(".")[2].lower()
    readers = {"txt": _read_txt, "csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}
    if suffix not in readers:
        raise UserError(f"prompts: {source} is of an unknown kind; {_REMEDY}")
    try:
        rows = list(readers[suffix](storage.read_bytes(source)))
    except (OSError, ValueError, OverflowError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"prompts: {source} cannot be read as {suffix}: {error}") from error
    if not rows:
        raise UserError(f"prompts: {source} holds no prompts; {_REMEDY}")
    return _prompts([(f"prompts: {source}, {where}", row) for where, row in rows], source.rpartition("/")[0])


_COLUMNS = ("prompt", "seed", "id", "image", "clip")
_Rows = Iterable[tuple[str, Mapping[str, Any] | ValueError]]  # where each is; an error where it is none


def _prompts(rows: _Rows, folder: str) -> list[Prompt]:
    """The prompts of rows; a ``UserError`` that tells of all rows that are none."""
    prompts: list[Prompt] = []
    mistakes: list[str] = []
    first_of: dict[str, str] = {}
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            prompt = _prompt(row, where, folder)
            if prompt.id is not None and (first := first_of.setdefault(prompt.id, where)) != where:
                raise ValueError(f"the id {prompt.id!r} is that of {first} too; give another")
            prompts.append(prompt)
        except ValueError as error:
            mistakes.append(f"{where}: {error}")
    if mistakes:
        raise UserError(listed(mistakes))
    return prompts


def _read_txt(data: bytes) -> _Rows:
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield f"line {number}", {"prompt": line.strip()}


def _read_csv(data: bytes) -> _Rows:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    names = reader.fieldnames or []
    _check_columns(names)
    for row in reader:
        surplus = len(row.get(None) or ())  # what is behind the last column
        why = f"{len(names) + surplus} values for {len(names)} columns: quote a prompt that holds a comma"
        yield f"line {reader.line_num}", ValueError(why) if surplus else row


def _read_jsonl(data: bytes) -> _Rows:
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _json_row(line)


def _json_row(line: str) -> Mapping[str, Any] | ValueError:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        _check_columns(list(row))
    except (json.JSONDecodeError, RecursionError) as error:
        return ValueError(f"it is no JSON: {str(error).replace('line 1 ', '')}")
    except ValueError as error:
        return error
    return row


def _read_parquet(data: bytes) -> _Rows:
    file = open_parquet(io.BytesIO(data))
    _check_columns(names := file.schema_arrow.names)
    table = file.read([name for name in _COLUMNS if name in names], use_threads=False)
    for number, row in enumerate(table.to_pylist()):
        yield f"row {number}", row


def _check_columns(names: Sequence[str]) -> None:
    """Others than those that are read are ignored, but not one that looks like a slip of the pen."""
    if "prompt" not in names:
        raise ValueError(f"it has no column prompt, only {', '.join(names) or 'none'}")
    for name in names:
        if name in _COLUMNS and names.count(name) > 1:
            raise ValueError(f"it has several columns {name!r}: keep one of them")
        meant = difflib.get_close_matches(name.strip().lower(), _COLUMNS, n=1, cutoff=0.8)
        if name not in _COLUMNS and meant and meant[0] not in names:
            raise ValueError(f"it has a column {name!r}, which is not read: rename it to {meant[0]!r}, or drop it")


def _prompt(row: Mapping[str, Any], where: str, folder: str) -> Prompt:
    for column in _COLUMNS:
        _check_characters(column, row.get(column))
    text, seed, name = row.get("prompt"), row.get("seed"), row.get("id")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the prompt is {text!r}; every row needs a text")
    if row.get("image") and row.get("clip"):
        raise ValueError("image and clip are both named: a video begins with one of them")
    return Prompt(
        text=text.strip(),
        seed=_seed(seed),
        id=str(name) if name is not None and str(name).strip() else None,
        image=_path(row.get("image"), folder, "image"),
        clip=_path(row.get("clip"), folder, "clip"),
        where=where,
    )


def _check_characters(column: str, value: Any) -> None:
    """Halves of characters, as JSON can hold them where a text was cut, are in no file or tokenizer's text."""
    if not (isinstance(value, str) and value.isascii()):
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{column}, {value!r:.60}, holds half a character at {error.start}: no text") from error


def _path(value: Any, folder: str, name: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a path, or be left out")
    is_whole = value.startswith("/") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", value)
    return value if is_whole or not folder else f"{folder}/{value}"


def _seed(value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        seed = int(value) if isinstance(value, str) else value
    except ValueError:
        seed = value
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed is {value!r}; it must be a whole number in 0..2^63-1, or be left out")
    return seed
