"""Publishing: kept clips become an immutable snapshot of token shards, with its ledger, manifest and dataset card.

The same clips, captions, codes and options give the same bytes: rows are ordered by a seeded hash of their keys, every
file is made by one writer with fixed settings, and nothing of the run (time, host, paths, number of workers) goes in.
The id is drawn from the content, so publishing an unchanged dataset finds its newest snapshot and writes nothing, and
publishing again after an interruption finds the files that are there and writes the others.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.card import dataset_card
from pipelines.data.snapshot.ledger import (
    count_statuses,
    ledger_path,
    look_at_part,
    partition_keys,
    write_ledger_part,
)
from pipelines.data.snapshot.read import (
    MANIFEST,
    SNAPSHOTS,
    Bucket,
    LedgerInfo,
    LedgerPart,
    Manifest,
    Snapshot,
    SplitTotal,
    TokenizerInfo,
    list_snapshots,
    open_snapshot,
    snapshot_number,
)
from pipelines.data.snapshot.schemas import LEDGER
from pipelines.data.snapshot.shards import (
    PlannedShard,
    bucket_shards,
    hash_int,
    look_at_shard,
    plan_shards,
    write_shards,
)
from pipelines.data.stage.columns import digest_rows, take
from pipelines.data.stage.tasks import is_worth_tasks, run_tasks
from pipelines.data.stage.values import ValueGroup
from pipelines.storage.lock import check_lock

_FORMAT = 4  # counted up where the same content gives other bytes, or is hashed otherwise
_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class SnapshotContent:
    """All that a snapshot is made of."""

    clips: pa.Table  # the kept clips, as ``PUBLISHED_CLIPS``
    code_groups: Callable[[], Iterable[ValueGroup]]  # codes of all clips, which are numbered in the order of ``clips``
    ledger: pa.Table  # a table of ``schemas.LEDGER``, in any order
    tokenizer: TokenizerInfo  # what made the codes
    created_from: dict[str, Any]  # the config (without paths and resources) and stage hashes behind it


def draw_split(group: str, *, seed: int, val_share: float) -> str:
    """The split of a source or duplicate group: a pure function, so that a group never straddles two splits."""
    return "val" if hash_int(f"split:{seed}:{group}") < val_share * 2**64 else "train"


def write_snapshot(dataset: str, content: SnapshotContent, config: PublishConfig) -> Snapshot:
    """Publish, or find that the newest snapshot holds just this.

    The caller sees to it that nobody else publishes to the dataset meanwhile. An interrupted call leaves a folder
    without manifest, which no reader looks at; the next call goes on with it, or removes it if it publishes something
    else. A ``JobError`` if another run took the dataset over.
    """
    parts = _Parts(content.ledger)
    digest = _content_digest(content, parts, config)
    published = list_snapshots(dataset)
    folder = storage.join(dataset, SNAPSHOTS)
    planned = list(plan_shards(content.clips, seed=config.seed, shard_mb=config.shard_mb))
    if published and published[-1].endswith(digest[:8]):
        return _restored(dataset, storage.join(folder, published[-1]), content, parts, planned)
    number = 1 + max((snapshot_number(name) or 0 for name in published), default=0)
    snapshot_id = f"v{number:04d}-{digest[:8]}"
    for name in storage.list_names(folder):  # what an interrupted call left
        if snapshot_number(name) is not None and name not in (*published, snapshot_id):
            storage.remove(storage.join(folder, name))
    uri = storage.join(folder, snapshot_id)

    found = [file.path for file in storage.list_files(uri)]
    buckets = _write_shards(dataset, uri, content, planned, found)
    ledger_parts = _write_ledger(dataset, uri, parts, _look_at_ledger(uri, parts, found))
    manifest = Manifest(
        snapshot_id=snapshot_id,
        parents=tuple(published[-1:]),
        created_from={**content.created_from, "publish": asdict(config)},
        tokenizer=content.tokenizer,
        captioners=_captioners(content.clips),
        buckets=buckets,
        totals={name: _total(buckets, name) for name in ("train", "val")},
        ledger=LedgerInfo(content.ledger.num_rows, count_statuses([content.ledger]), ledger_parts),
    )
    _write_card(uri, manifest, content.ledger)
    check_lock(dataset)
    storage.remove_unfinished(uri)
    storage.write_json_atomic(storage.join(uri, MANIFEST), asdict(manifest))
    return open_snapshot(uri)


def _restored(
    dataset: str, uri: str, content: SnapshotContent, parts: "_Parts", planned: Sequence[PlannedShard]
) -> Snapshot:
    """A published snapshot, files of which are written again, byte for byte, where they are not what they were.

    Those are shards that are missing or of another size (what else may be wrong with them, ``lumos data repair`` finds
    and mends), and parts of the ledger that are missing or hold other bytes: nothing else can restore them.
    """
    snapshot = open_snapshot(uri)
    found = {file.path: file.size for file in storage.list_files(uri)}
    every = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    whole = {shard.path: shard for shard in every if found.get(shard.path) == shard.bytes}
    for _ in write_shards(uri, content.clips, content.code_groups, planned, whole):
        check_lock(dataset)
    listed = set(snapshot.manifest.ledger.parts)
    _write_ledger(dataset, uri, parts, [part for part in _look_at_ledger(uri, parts, found) if part in listed])
    if _CARD not in found:
        _write_card(uri, snapshot.manifest, content.ledger)
    storage.remove_unfinished(uri)
    return snapshot


class _Parts:
    """The parts of a ledger by number, each put together when it is asked for."""

    def __init__(self, ledger: pa.Table) -> None:
        self._ledger = ledger
        self._places = dict(partition_keys(ledger["key"]))
        self.bytes = ledger.nbytes

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def num_rows(self, number: int) -> int:
        return len(self._places[number])

    def part(self, number: int) -> pa.Table:
        """Its rows, sorted by key."""
        return take(self._ledger, self._places[number]).cast(LEDGER)


def _write_card(uri: str, manifest: Manifest, ledger: pa.Table) -> None:
    storage.write_bytes_atomic(storage.join(uri, _CARD), dataset_card(manifest, ledger).encode())


def _look_at_ledger(uri: str, parts: _Parts, found: Container[str]) -> list[LedgerPart]:
    """What a manifest would say of the parts of a ledger that are there."""
    there = [(uri, number, parts.num_rows(number)) for number in parts if ledger_path(number) in found]
    return list(run_tasks(look_at_part, there, remote=is_worth_tasks(parts.bytes)))


def _write_ledger(dataset: str, uri: str, parts: _Parts, there: Sequence[LedgerPart]) -> tuple[LedgerPart, ...]:
    """Write the parts of a ledger but those that are there; all of them."""
    written = {part.path: part for part in there}
    new = ((uri, number, parts.part(number)) for number in parts if ledger_path(number) not in written)
    for part in run_tasks(write_ledger_part, new, remote=is_worth_tasks(parts.bytes)):
        check_lock(dataset)
        written[part.path] = part
    return tuple(written[path] for path in sorted(written))


def _write_shards(
    dataset: str, uri: str, content: SnapshotContent, planned: Sequence[PlannedShard], found: Sequence[str]
) -> tuple[Bucket, ...]:
    there = [shard for shard in planned if shard.path in found]
    remote = is_worth_tasks(sum(shard.bytes for shard in there))
    looks = run_tasks(look_at_shard, ((uri, shard.path, len(shard.clips)) for shard in there), remote=remote)
    whole = {shard.path: shard for shard in looks}
    written = []
    for shard in write_shards(uri, content.clips, content.code_groups, planned, whole):
        check_lock(dataset)
        written.append(shard)
    return bucket_shards(planned, written)


def _content_digest(content: SnapshotContent, ledger: _Parts, config: PublishConfig) -> str:
    clips = content.clips
    parts = {
        "created_from": content.created_from,
        "publish": asdict(config),
        "tokenizer": asdict(content.tokenizer),
        "writer": [pa.__version__, _FORMAT],
        "clips": [digest_rows(take(clips, places)) for _, places in partition_keys(clips["clip_id"])],
        "ledger": [digest_rows(ledger.part(number)) for number in ledger],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _total(buckets: Sequence[Bucket], split: str) -> SplitTotal:
    chosen = [bucket for bucket in buckets if bucket.split == split]
    return SplitTotal(rows=sum(bucket.rows for bucket in chosen), tokens=sum(bucket.tokens for bucket in chosen))


def _captioners(clips: pa.Table) -> tuple[str, ...]:
    names = pc.unique(pc.struct_field(pc.list_flatten(clips["captions"]), "captioner"))
    return tuple(sorted(names.to_pylist()))
