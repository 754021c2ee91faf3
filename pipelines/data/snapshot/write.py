"""Publishing: kept clips become an immutable snapshot of token shards, with its ledger, manifest and dataset card.

The same clips, captions, codes and options give the same bytes: rows are ordered by a seeded hash of their keys, one
writer makes every file with fixed settings, and nothing of the run (time, host, paths) goes in. The id is drawn from
the content, so publishing an unchanged dataset finds its newest snapshot and writes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lumos.config import require
from pipelines import storage
from pipelines.data.snapshot.card import dataset_card
from pipelines.data.snapshot.read import (
    BYTES_BESIDE_CODES,
    MANIFEST,
    SNAPSHOTS,
    Bucket,
    LedgerInfo,
    Manifest,
    Shard,
    Snapshot,
    SplitTotal,
    TokenizerInfo,
    list_snapshots,
    open_snapshot,
    snapshot_number,
)
from pipelines.data.snapshot.schemas import LATER_COLUMNS, LEDGER, STATUSES, TOKENS
from pipelines.data.stage.columns import iterate, parquet_bytes, sort, take
from pipelines.storage.lock import check_lock

_ROW_GROUP_BYTES = 128_000  # of codes and captions: what a reader must decode for the sake of one row
_OLD_ROW_GROUP_ROWS = 256  # of snapshots whose manifest names none
# Codes hardly repeat: a dictionary of those in a row group takes more room than they do. Statistics of hashes and codes
# serve nobody, and made most of a footer.
_SHARD_LAYOUT = {
    "use_dictionary": False,
    "column_encoding": {"codes.list.element": "BYTE_STREAM_SPLIT"},
    "write_statistics": False,
}
_SHARD_FORMAT = 2  # counted up where the same clips give other bytes
_LEDGER, _CARD = "ledger.parquet", "README.md"
LEDGER_ROW_GROUP_ROWS = 1 << 16
# A kept clip before its codes are fetched.
PUBLISHED_CLIPS = pa.schema(
    [*(field for field in TOKENS if field.name != "codes"), pa.field("codes_sha256", pa.string(), nullable=False)]
)
_Kind = tuple[str, int, int, int]  # split and latent shape t, h, w


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """How kept clips are laid out in a snapshot."""

    seed: int = 0  # of the shuffle and of the draw of the validation split
    val_share: float = 0.02  # of sources (not of clips) that go to the split "val"
    shard_mb: float = 128.0  # size that shards aim for

    def __post_init__(self) -> None:
        require(0 <= self.val_share < 1, f"val_share must be at least 0 and below 1, got {self.val_share}")
        require(self.shard_mb > 0, f"shard_mb must be positive, got {self.shard_mb}")


@dataclass(frozen=True, kw_only=True)
class SnapshotContent:
    """All that a snapshot is made of."""

    clips: pa.Table  # the kept clips, as ``PUBLISHED_CLIPS``
    # given the clip ids of each shard, the codes of each in that order, as arrays of list<uint16>
    read_codes: Callable[[Sequence[pa.ChunkedArray]], Iterable[pa.Array]]
    ledger: pa.Table  # a table of ``schemas.LEDGER``, in any order
    tokenizer: TokenizerInfo  # what made the codes
    created_from: dict[str, Any]  # the config (without paths and resources) and stage hashes behind it


def draw_split(group: str, *, seed: int, val_share: float) -> str:
    """The split of a source or duplicate group: a pure function, so that a group never straddles two splits."""
    return "val" if _hash_int(f"split:{seed}:{group}") < val_share * 2**64 else "train"


def write_snapshot(dataset: str, content: SnapshotContent, config: PublishConfig) -> Snapshot:
    """Publish, or find that the newest snapshot holds just this.

    The caller sees to it that nobody else publishes to the dataset meanwhile. An interrupted call leaves a folder
    without manifest, which no reader looks at and the next call removes. A ``JobError`` if another run took the dataset
    over.
    """
    ledger = sort(content.ledger.cast(LEDGER), ["key"])
    digest = _content_digest(content, ledger, config)
    published = list_snapshots(dataset)
    folder = storage.join(dataset, SNAPSHOTS)
    if published and published[-1].endswith(digest[:8]):
        return _restored(storage.join(folder, published[-1]), content, ledger, config)
    for name in storage.list_names(folder):  # what an interrupted call left
        if snapshot_number(name) is not None and name not in published:
            storage.remove(storage.join(folder, name))
    number = 1 + max((snapshot_number(name) or 0 for name in published), default=0)
    snapshot_id = f"v{number:04d}-{digest[:8]}"
    uri = storage.join(folder, snapshot_id)

    buckets = _write_shards(uri, content, config)
    ledger_data = _write_ledger(uri, ledger)
    manifest = Manifest(
        snapshot_id=snapshot_id,
        parents=tuple(published[-1:]),
        created_from={**content.created_from, "publish": asdict(config)},
        tokenizer=content.tokenizer,
        captioners=_captioners(content.clips),
        buckets=buckets,
        totals={name: _total(buckets, name) for name in ("train", "val")},
        ledger=LedgerInfo(
            _LEDGER, ledger.num_rows, hashlib.sha256(ledger_data).hexdigest(), counts=count_statuses(ledger)
        ),
    )
    storage.write_bytes_atomic(storage.join(uri, _CARD), dataset_card(manifest, ledger).encode())
    check_lock(dataset)
    storage.write_json_atomic(storage.join(uri, MANIFEST), asdict(manifest))
    return open_snapshot(uri)


def _restored(uri: str, content: SnapshotContent, ledger: pa.Table, config: PublishConfig) -> Snapshot:
    """A published snapshot; files of it that are missing or of another size are written again, byte for byte."""
    snapshot = open_snapshot(uri)
    shards = {shard.path: shard.bytes for bucket in snapshot.manifest.buckets for shard in bucket.shards}
    found = {file.path: file.size for file in storage.list_files(uri)}
    if any(found.get(path) != size for path, size in shards.items()):
        _write_shards(uri, content, config)
    if _LEDGER not in found:
        _write_ledger(uri, ledger)
    if _CARD not in found:
        storage.write_bytes_atomic(storage.join(uri, _CARD), dataset_card(snapshot.manifest, ledger).encode())
    return snapshot


def _write_ledger(uri: str, ledger: pa.Table) -> bytes:
    data = parquet_bytes(ledger, row_group_rows=LEDGER_ROW_GROUP_ROWS)
    storage.write_bytes_atomic(storage.join(uri, _LEDGER), data)
    return data


def count_statuses(ledger: pa.Table) -> dict[str, int]:
    """Rows of a ledger by status, every status named."""
    counts = {count["values"]: count["counts"] for count in pc.value_counts(ledger["status"]).to_pylist()}
    return {status: counts.get(status, 0) for status in STATUSES}


def _content_digest(content: SnapshotContent, ledger: pa.Table, config: PublishConfig) -> str:
    parts = {
        "created_from": content.created_from,
        "publish": asdict(config),
        "tokenizer": asdict(content.tokenizer),
        "writer": [pa.__version__, _SHARD_FORMAT],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for table in (sort(content.clips, ["clip_id"]), ledger):
        for batch in table.to_batches(max_chunksize=4096):
            digest.update(json.dumps(batch.to_pydict(), sort_keys=True).encode())
    return digest.hexdigest()


def _plan_shards(clips: pa.Table, config: PublishConfig) -> Iterator[tuple[_Kind, str, NDArray[np.int64]]]:
    """Of each shard, its kind, path, and the numbers of its clips in order; kind by kind, in a fixed order."""
    columns = ["split", "t", "h", "w"]
    groups = clips.select(columns).group_by(columns).aggregate([]).sort_by([(name, "ascending") for name in columns])
    for group in groups.to_pylist():
        mask = np.ones(clips.num_rows, dtype=bool)
        for name, value in group.items():
            mask &= pc.equal(clips[name], value).to_numpy()
        members = np.flatnonzero(mask)
        split, t, h, w = group.values()
        per_shard = max(1, int(config.shard_mb * 1e6) // (2 * t * h * w + BYTES_BESIDE_CODES))
        ids = iterate(take(clips["clip_id"], members))
        dealt = deal_shards(ids, -(-len(members) // per_shard), seed=config.seed)
        for number, chosen in enumerate(dealt):
            path = f"data/{split}/{t}x{h}x{w}/shard-{number:05d}.parquet"
            yield (split, t, h, w), path, members[chosen]


def _write_shards(uri: str, content: SnapshotContent, config: PublishConfig) -> tuple[Bucket, ...]:
    planned = list(_plan_shards(content.clips, config))
    codes = content.read_codes([take(content.clips["clip_id"], rows) for _, _, rows in planned])
    shards: dict[_Kind, list[Shard]] = {}
    for (kind, path, rows), own in zip(planned, codes, strict=True):
        data = shard_bytes(take(content.clips, rows), own, row_group_rows=row_group_rows(*kind[1:]))
        storage.write_bytes_atomic(storage.join(uri, path), data)
        written = Shard(path, len(rows), len(data), hashlib.sha256(data).hexdigest())
        shards.setdefault(kind, []).append(written)
    return tuple(
        Bucket(
            *kind,
            sum(shard.rows for shard in own),
            sum(shard.bytes for shard in own),
            tuple(own),
            row_group_rows=row_group_rows(*kind[1:]),
        )
        for kind, own in shards.items()
    )


def deal_shards(ids: Iterable[str], count: int, *, seed: int) -> list[NDArray[np.int64]]:
    """Which clips, by index and in which order, each of ``count`` shards of a bucket holds: a pure function."""
    hashes = np.fromiter((_hash_int(f"order:{seed}:{clip_id}") for clip_id in ids), np.uint64)
    return np.array_split(np.argsort(hashes, kind="stable"), count)


def row_group_rows(t: int, h: int, w: int) -> int:
    """Rows of a row group of a bucket."""
    return max(1, _ROW_GROUP_BYTES // (2 * t * h * w + BYTES_BESIDE_CODES))


def shard_bytes(clips: pa.Table, codes: pa.Array, *, row_group_rows: int | None) -> bytes:
    """The file of a shard, given its rows in order (as ``PUBLISHED_CLIPS``) and the codes of each (list<uint16>).

    Without a size of row groups, it is as the program wrote it whose manifests name none.
    """
    table = clips.drop_columns(["codes_sha256"]).append_column(TOKENS.field("codes"), codes).select(TOKENS.names)
    if row_group_rows is None:
        older = table.drop_columns(list(LATER_COLUMNS))
        return parquet_bytes(
            older.cast(pa.schema(map(TOKENS.field, older.column_names))), row_group_rows=_OLD_ROW_GROUP_ROWS
        )
    return parquet_bytes(table.cast(TOKENS), row_group_rows=row_group_rows, **_SHARD_LAYOUT)


def _total(buckets: Sequence[Bucket], split: str) -> SplitTotal:
    chosen = [bucket for bucket in buckets if bucket.split == split]
    return SplitTotal(rows=sum(bucket.rows for bucket in chosen), tokens=sum(bucket.tokens for bucket in chosen))


def _captioners(clips: pa.Table) -> tuple[str, ...]:
    names = pc.unique(pc.struct_field(pc.list_flatten(clips["captions"]), "captioner"))
    return tuple(sorted(names.to_pylist()))


def _hash_int(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
