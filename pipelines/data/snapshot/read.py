"""Reading published snapshots: the manifest, and the token shards it names.

A dataset holds ``snapshots/<id>/``; each is immutable and counts only once its ``manifest.json`` is there, which is
written last.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from lumos.config import TokenizerInfo as TokenizerInfo  # part of the manifest
from pipelines import storage
from pipelines.data.snapshot.schemas import LEDGER, SCHEMA_VERSION
from pipelines.errors import UserError
from pipelines.parquet import read_parquet

SNAPSHOTS = "snapshots"
MANIFEST = "manifest.json"
BYTES_BESIDE_CODES = 512  # a row's ids and captions, roughly


class TokenizerIdentity(Protocol):
    """What tells one visual tokenizer from another; every loaded tokenizer has it."""

    @property
    def kind(self) -> str:
        """Name of the family."""

    @property
    def codebook_size(self) -> int:
        """Codes are 0..codebook_size - 1."""

    @property
    def weights_hash(self) -> str:
        """Hash of the weights; equal hash, equal codes."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file of tokens."""

    path: str  # relative to the snapshot
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bucket:
    """The shards of one split and latent shape."""

    split: str
    t: int
    h: int
    w: int
    rows: int
    bytes: int
    shards: tuple[Shard, ...]
    row_group_rows: int | None = None  # of its shards; None: an older program wrote them, 256 to a group

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent [t, h, w] of its rows."""
        return self.t, self.h, self.w

    @property
    def tokens(self) -> int:
        """Codes in all its rows."""
        return self.rows * self.t * self.h * self.w

    @property
    def row_bytes(self) -> int:
        """Of a decoded row, roughly."""
        return 2 * self.t * self.h * self.w + BYTES_BESIDE_CODES


@dataclass(frozen=True)
class SplitTotal:
    """Size of one split."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class LedgerPart:
    """One Parquet file of a ledger, its rows sorted by key; all of them come after those of the part before."""

    path: str  # relative to the snapshot
    rows: int
    sha256: str


@dataclass(frozen=True)
class LedgerInfo:
    """The files of a snapshot's ledger, and its rows by status."""

    rows: int
    counts: dict[str, int]
    parts: tuple[LedgerPart, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a snapshot but its rows."""

    snapshot_id: str
    tokenizer: TokenizerInfo
    buckets: tuple[Bucket, ...]
    totals: dict[str, SplitTotal]
    ledger: LedgerInfo
    parents: tuple[str, ...] = ()
    captioners: tuple[str, ...] = ()
    created_from: dict[str, Any]
    schema_version: int = SCHEMA_VERSION


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Snapshot:
    """A published snapshot, opened for reading. It can be pickled, so workers may hold it."""

    uri: str
    manifest: Manifest
    digest: str  # hex SHA-256 of manifest.json, which itself holds the hashes of all other files

    @property
    def dataset(self) -> str | None:
        """The dataset that it lies in; None where it was copied elsewhere."""
        place = storage.filesystem(self.uri)[1] if storage.is_local(self.uri) else self.uri
        dataset, found, _ = place.rpartition(f"/{SNAPSHOTS}/")
        return dataset if found else None

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """The rows of one shard, all columns or some; a ``UserError`` if it is gone or its manifest counts others."""
        table = self._read(shard.path, columns)
        if table.num_rows != shard.rows:
            raise UserError(
                f"shard {storage.join(self.uri, shard.path)} has {table.num_rows} rows, its manifest says "
                f"{shard.rows}: the file was changed; publish the dataset again"
            )
        return table

    def read_ledger(self, columns: list[str] | None = None) -> pa.Table:
        """The ledger, sorted by key, all columns or some."""
        schema = LEDGER if columns is None else pa.schema([LEDGER.field(name) for name in columns])
        return pa.concat_tables(list(self.ledger_pieces(columns)) or [schema.empty_table()])

    def ledger_pieces(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The same, a part at a time.

        Raises:
            UserError: if a part is gone, is damaged, or has other rows than its manifest counts.
        """
        for part in self.manifest.ledger.parts:
            table = self._read(part.path, columns)
            if table.num_rows != part.rows:
                raise UserError(
                    f"{storage.join(self.uri, part.path)} has {table.num_rows} rows, its manifest says {part.rows}: "
                    "the file was changed; copy it back, or publish the dataset again"
                )
            yield table

    def _read(self, path: str, columns: list[str] | None) -> pa.Table:
        uri = storage.join(self.uri, path)
        try:
            with storage.open_file(uri) as file:
                return read_parquet(file, columns)
        except FileNotFoundError as error:
            raise UserError(
                f"{uri} is missing from its snapshot; copy it back, or publish the dataset again"
            ) from error
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri} is damaged ({error}); copy it back, or publish the dataset again") from error


def open_snapshot(uri: str, *, expected_tokenizer: TokenizerIdentity | None = None) -> Snapshot:
    """Open the snapshot in a folder, or the newest one of a dataset; refuse codes that another tokenizer made.

    Raises:
        UserError: if there is none, it is of a newer schema version, damaged, or made by another tokenizer.
    """
    found = uri
    if not storage.exists(storage.join(uri, MANIFEST)):
        published = list_snapshots(uri)
        if not published:
            raise UserError(f"{uri} holds no published snapshot; make one with `lumos curate`, or check the path")
        found = storage.join(uri, SNAPSHOTS, published[-1])
    data = storage.read_bytes(storage.join(found, MANIFEST))
    try:
        value = json.loads(data)
        version = value["schema_version"]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"snapshot {found} has schema version {version}, newer than {SCHEMA_VERSION}, the newest this lumos "
                "reads: update lumos, or publish the dataset with this one"
            )
        if version == 1 and "ledger" in value:
            ledger = value["ledger"]
            ledger["parts"] = [{name: ledger.pop(name) for name in ("path", "sha256")} | {"rows": ledger["rows"]}]
        manifest = _MANIFEST.validate_python(value)  # keys that this version does not know are left aside
    except (ValueError, KeyError, TypeError) as error:
        problem = repr(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(
            f"{storage.join(found, MANIFEST)} is no manifest of a snapshot ({problem}): copy it back; or delete "
            f"{found}, and give the `lumos curate` that made it again"
        ) from error
    if expected_tokenizer is not None:
        _check_tokenizer(found, manifest.tokenizer, expected_tokenizer)
    return Snapshot(uri=found, manifest=manifest, digest=hashlib.sha256(data).hexdigest())


def _check_tokenizer(uri: str, made_by: TokenizerInfo, expected: TokenizerIdentity) -> None:
    names = [f"{one.kind} ({one.codebook_size} codes, weights {one.weights_hash[:19]})" for one in (made_by, expected)]
    if any(getattr(made_by, name) != getattr(expected, name) for name in ("kind", "codebook_size", "weights_hash")):
        raise UserError(
            f"snapshot {uri} was made by the tokenizer {names[0]}, not by {names[1]} which is asked for: curate the "
            "dataset with that tokenizer, or ask for the one that made it"
        )


def list_snapshots(dataset: str) -> list[str]:
    """Ids of a dataset's published snapshots, oldest first."""
    folder = storage.join(dataset, SNAPSHOTS)
    published = [
        name
        for name in storage.list_names(folder)
        if snapshot_number(name) is not None and storage.exists(storage.join(folder, name, MANIFEST))
    ]
    return sorted(published, key=lambda name: (snapshot_number(name) or 0, name))


def open_snapshots(dataset: str, ids: Iterable[str]) -> list[Snapshot]:
    """Some of a dataset's published snapshots."""
    return [open_snapshot(storage.join(dataset, SNAPSHOTS, name)) for name in ids]


def snapshot_number(name: str) -> int | None:
    """The number in an id such as v0001-5f3a90bc, or None for any other name."""
    number, dash, _ = name.partition("-")
    return int(number[1:]) if dash and number[:1] == "v" and number[1:].isdecimal() else None
