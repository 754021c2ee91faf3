"""Token shards: which clips each holds and in which order, and how workers write them.

Clips are shuffled, so that every shard has some from almost every file of codes. Each file is read by a task that deals
its codes to the tasks that write shards, some shards each, through Ray's store. Where that cannot hold all of them, it
is done in rounds: each writes as many shards as the store holds codes of, and reads every file again.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.snapshot.read import BYTES_BESIDE_CODES, Bucket, Shard
from pipelines.data.snapshot.schemas import LATER_COLUMNS, TOKENS
from pipelines.data.stage.columns import iterate, parquet_bytes, take
from pipelines.data.stage.tasks import is_worth_tasks, run_tasks, start_tasks, store_bytes
from pipelines.data.stage.values import ValueGroup

_ROW_GROUP_BYTES = 128_000  # of codes and captions: what a reader must decode for the sake of one row
_OLD_ROW_GROUP_ROWS = 256  # of snapshots whose manifest names none
# Codes hardly repeat: a dictionary of those in a row group takes more room than they do. Statistics of hashes and codes
# serve nobody, and made most of a footer.
_SHARD_LAYOUT = {
    "use_dictionary": False,
    "column_encoding": {"codes.list.element": "BYTE_STREAM_SPLIT"},
    "write_statistics": False,
}
_TASK_BYTES = 128e6  # of the shards that one task writes, if it is not one larger shard; and that one task deals
_ROUND_BYTES = 32e9  # of the shards of a round, at most, as there is a piece for each two tasks that deal and write
_STORE_SHARE = 0.4  # of Ray's store, that the codes of a round may take
# A kept clip before its codes are fetched.
PUBLISHED_CLIPS = pa.schema(
    [*(field for field in TOKENS if field.name != "codes"), pa.field("codes_sha256", pa.string(), nullable=False)]
)
Kind = tuple[str, int, int, int]  # split and latent shape t, h, w


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written."""

    kind: Kind
    path: str  # relative to the snapshot
    clips: NDArray[np.int64]  # numbers of its clips, in order

    @property
    def bytes(self) -> int:
        """Of its rows, roughly."""
        return len(self.clips) * row_bytes(*self.kind[1:])


def plan_shards(clips: pa.Table, *, seed: int, shard_mb: float) -> Iterator[PlannedShard]:
    """The shards of a snapshot, kind by kind, in a fixed order."""
    columns = ["split", "t", "h", "w"]
    groups = clips.select(columns).group_by(columns).aggregate([]).sort_by([(name, "ascending") for name in columns])
    for group in groups.to_pylist():
        mask = np.ones(clips.num_rows, dtype=bool)
        for name, value in group.items():
            mask &= pc.equal(clips[name], value).to_numpy()
        members = np.flatnonzero(mask)
        split, t, h, w = group.values()
        per_shard = max(1, int(shard_mb * 1e6) // row_bytes(t, h, w))
        ids = iterate(take(clips["clip_id"], members))
        for number, chosen in enumerate(deal_shards(ids, -(-len(members) // per_shard), seed=seed)):
            path = f"data/{split}/{t}x{h}x{w}/shard-{number:05d}.parquet"
            yield PlannedShard((split, t, h, w), path, members[chosen])


def deal_shards(ids: Iterable[str], count: int, *, seed: int) -> list[NDArray[np.int64]]:
    """Which clips, by index and in which order, each of ``count`` shards of a bucket holds: a pure function."""
    hashes = np.fromiter((hash_int(f"order:{seed}:{clip_id}") for clip_id in ids), np.uint64)
    return np.array_split(np.argsort(hashes, kind="stable"), count)


def hash_int(text: str) -> int:
    """A text as one of 2^64 numbers that are equally likely."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def row_bytes(t: int, h: int, w: int) -> int:
    """Of a row of a bucket, roughly."""
    return 2 * t * h * w + BYTES_BESIDE_CODES


def row_group_rows(t: int, h: int, w: int) -> int:
    """Rows of a row group of a bucket."""
    return max(1, _ROW_GROUP_BYTES // row_bytes(t, h, w))


def shard_bytes(clips: pa.Table, codes: pa.Array | pa.ChunkedArray, *, row_group_rows: int | None) -> bytes:
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


def write_shards(
    uri: str,
    clips: pa.Table,
    code_groups: Callable[[], Iterable[ValueGroup]],
    planned: Sequence[PlannedShard],
    whole: Mapping[str, Shard],
) -> Iterator[Shard]:
    """Write the shards of a snapshot that are not there yet, by Ray's workers if they are many; in any order.

    A worker that is killed leaves no half of a shard, and another one does its part again.

    Args:
        uri: Of the snapshot.
        clips: The kept clips, as ``PUBLISHED_CLIPS``.
        code_groups: Where their codes are.
        planned: All shards.
        whole: Those that are there, by path.

    Yields:
        Each shard once it is there.

    Raises:
        JobError: codes are missing, or workers die again and again.
    """
    yield from whole.values()
    missing = [shard for shard in planned if shard.path not in whole]
    if not missing:
        return
    remote = is_worth_tasks(sum(shard.bytes for shard in missing))
    for shards in _grouped(missing, max(_TASK_BYTES, min(_ROUND_BYTES, _STORE_SHARE * store_bytes()))):
        yield from _write_round(uri, clips, code_groups(), shards, remote=remote)


def _write_round(
    uri: str, clips: pa.Table, groups: Iterable[ValueGroup], shards: Sequence[PlannedShard], *, remote: bool
) -> Iterator[Shard]:
    """Write some shards, the codes of which Ray's store can hold."""
    bundles = _grouped(shards, _TASK_BYTES)
    places = np.full(clips.num_rows, -1, np.int64)  # of each clip among those of all these shards
    every = np.concatenate([shard.clips for shard in shards])
    places[every] = np.arange(len(every))
    firsts = np.cumsum([0, *(sum(len(shard.clips) for shard in bundle) for bundle in bundles)])
    most = max(1, int(len(every) * _TASK_BYTES / sum(shard.bytes for shard in shards)))
    calls = ((*zip(*some, strict=True), firsts) for some in _readings(groups, places, most))
    dealt = list(start_tasks(deal_codes, calls, remote=remote, num_returns=len(bundles)))

    def writes() -> Iterator[tuple[Any, ...]]:
        for number, bundle in enumerate(bundles):
            rows = take(clips, np.concatenate([shard.clips for shard in bundle]))
            plan = [(shard.kind, shard.path, len(shard.clips)) for shard in bundle]
            pieces = [references[number] for references in dealt]
            for references in dealt:
                references[number] = None  # its memory is free once the shards are written
            yield uri, rows, plan, int(firsts[number]), *pieces

    for written in run_tasks(write_bundle, writes(), remote=remote):
        yield from written


def _readings(
    groups: Iterable[ValueGroup], places: NDArray[np.int64], most: int
) -> Iterator[list[tuple[Callable[[], pa.ChunkedArray], NDArray[np.int64]]]]:
    """Groups of which clips are wanted, how each is read and the places of its clips, some together for a task.

    Of these about ``most`` clips are wanted, or those of one group.
    """
    some: list[tuple[Callable[[], pa.ChunkedArray], NDArray[np.int64]]] = []
    count = 0
    for group in groups:
        wanted = int(np.count_nonzero(places[group.rows] >= 0))
        if some and count + wanted > most:
            yield some
            some, count = [], 0
        if wanted:
            some.append((group.read, places[group.rows]))
            count += wanted
    if some:
        yield some


def _grouped(shards: Sequence[PlannedShard], size: float) -> list[list[PlannedShard]]:
    """Shards that follow each other, of about so many bytes together."""
    before = np.cumsum([0, *(shard.bytes for shard in shards)])[:-1] // size
    numbered = groupby(zip(before.tolist(), shards, strict=True), key=lambda pair: pair[0])
    return [[shard for _, shard in pairs] for _, pairs in numbered]


def deal_codes(
    reads: Sequence[Callable[[], pa.ChunkedArray]], places: Sequence[NDArray[np.int64]], firsts: NDArray[np.int64]
) -> Any:
    """Codes of some groups of clips, dealt to bundles of shards: of each bundle, a table of places and codes.

    ``places`` are those of each group's clips among all, -1 where one is not wanted; bundles begin at ``firsts``, and
    end at the last of these.
    """
    dealt: list[list[pa.Table]] = [[] for _ in firsts[1:]]
    for read, group in zip(reads, places, strict=True):
        codes = read()
        order = np.argsort(group, kind="stable")
        bounds = np.searchsorted(group[order], firsts)
        for tables, (start, stop) in zip(dealt, pairwise(bounds.tolist()), strict=True):
            own = order[start:stop]
            tables.append(pa.table({"place": group[own], "codes": take(codes, own)}))
    every = [pa.concat_tables(tables) for tables in dealt]
    return every[0] if len(every) == 1 else every


def write_bundle(
    uri: str, rows: pa.Table, plan: Sequence[tuple[Kind, str, int]], first: int, *dealt: pa.Table
) -> list[Shard]:
    """Write some shards, given the rows of all of them, kind, path and length of each, and their codes as dealt."""
    table = pa.concat_tables([pa.table({"place": pa.array([], pa.int64()), "codes": _NO_CODES}), *dealt])
    places = table["place"].to_numpy() - first
    order = np.argsort(places, kind="stable")
    if not np.array_equal(places[order], np.arange(rows.num_rows)):
        raise RuntimeError(f"{len(places)} codes were dealt to {rows.num_rows} clips of {plan[0][1]}")
    written, start = [], 0
    for kind, path, length in plan:
        own = slice(start, start + length)
        start += length
        data = shard_bytes(
            rows.slice(own.start, length), take(table["codes"], order[own]), row_group_rows=row_group_rows(*kind[1:])
        )
        storage.write_bytes_atomic(storage.join(uri, path), data)
        written.append(Shard(path, length, len(data), hashlib.sha256(data).hexdigest()))
    return written


_NO_CODES = pa.array([], pa.list_(pa.uint16()))


def look_at_shard(uri: str, path: str, rows: int) -> Shard:
    """What a manifest says of a shard that is there."""
    data = storage.read_bytes(storage.join(uri, path))
    return Shard(path, rows, len(data), hashlib.sha256(data).hexdigest())


def bucket_shards(planned: Sequence[PlannedShard], written: Iterable[Shard]) -> tuple[Bucket, ...]:
    """The shards of a snapshot by kind, in the order in which they were planned."""
    by_path = {shard.path: shard for shard in written}
    buckets = []
    for kind, shards in groupby(planned, key=lambda shard: shard.kind):
        own = tuple(by_path[shard.path] for shard in shards)
        rows, size = sum(shard.rows for shard in own), sum(shard.bytes for shard in own)
        split, t, h, w = kind
        buckets.append(Bucket(split, t, h, w, rows, size, own, row_group_rows=row_group_rows(t, h, w)))
    return tuple(buckets)
