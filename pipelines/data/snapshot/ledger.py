"""The ledger: one row per clip, and one per source that yields none, with what became of it and why.

It is written in parts, each of the keys between two prefixes, so that parts can be made apart from each other.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.keys import ledger_file_key
from pipelines.data.reasons import REMOVED, exact_duplicate, overridden, reason_classes
from pipelines.data.snapshot.read import LedgerPart
from pipelines.data.snapshot.schemas import LEDGER, STAGES, STATUSES
from pipelines.data.stage.columns import contained, parquet_bytes, positions, take

_PART_ROWS = 1 << 16  # of a part, at most on the average
_PREFIX_DIGITS = 4  # of keys, which begin with the hexadecimal digits of a hash, that decide in which part they are
LEDGER_ROW_GROUP_ROWS = 1 << 16


class Verdicts:
    """Status and reason of every clip, in the order of the clip table, and how far each went; all are kept at first."""

    def __init__(self, count: int) -> None:
        self._status = np.full(count, STATUSES.index("kept"), np.int8)
        self._reasons: dict[int, str] = {}
        self._protected: dict[int, tuple[str, list[str]]] = {}  # note, and reasons that did not count
        self._seen: dict[str, NDArray[np.bool_]] = {"split": np.ones(count, bool)}

    def set(self, index: int, status: str, reason: str) -> None:
        """Change what becomes of a clip; one that is protected stays, unless it failed."""
        if index in self._protected and status != "failed":
            note, instead = self._protected[index]
            instead += [part for part in reason.split("; ") if part not in instead]  # some are found more than once
            self._reasons[index] = overridden(note, instead)
        else:
            self._status[index], self._reasons[index] = STATUSES.index(status), reason

    def protect(self, index: int, note: str) -> None:
        """Keep a clip, as a person said, whatever is decided later."""
        self._protected[index] = (note, [])
        self._reasons[index] = overridden(note)

    def expose(self, index: int) -> bool:
        """Protect a clip no longer; whether it was."""
        return self._protected.pop(index, None) is not None

    def mark(self, stage: str, indices: NDArray[np.int64]) -> None:
        """Note the clips that a stage has seen."""
        self._seen[stage] = np.zeros(len(self._status), bool)
        self._seen[stage][indices] = True

    @property
    def kept(self) -> NDArray[np.int64]:
        """Indices of the clips that are kept so far."""
        return np.flatnonzero(self._status == STATUSES.index("kept"))

    def columns(self, hashes: Mapping[str, str]) -> dict[str, pa.Array]:
        """As the ledger's columns status, reason and stage_hashes, given each stage's configuration hash."""
        count = len(self._status)
        unseen = np.zeros(count, bool)  # by a stage that is switched off
        seen = [
            pc.if_else(pa.array(self._seen.get(stage, unseen)), pa.scalar(hashes.get(stage), pa.string()), None)
            for stage in STAGES
        ]
        return {
            "status": pa.array(STATUSES, pa.string()).take(pa.array(self._status)),
            "reason": pa.array([self._reasons.get(index, "") for index in range(count)], pa.string()),
            "stage_hashes": pa.StructArray.from_arrays(seen, names=list(STAGES)),
        }


def build_ledger(
    sources: pa.Table,
    first: pa.Table,
    clips: pa.Table,
    scores: pa.StructArray,
    failed: pa.Table,
    verdicts: Verdicts,
    hashes: Mapping[str, str],
) -> pa.Table:
    """Put the ledger together; it is not sorted yet.

    Args:
        sources: Every file named: path, source_id (null where unreadable) and error.
        first: Those that stand for their content: source_id and path.
        clips: The split stage's clips.
        scores: All of theirs.
        failed: Its rows of sources without clips.
        verdicts: What became of the clips.
        hashes: Configuration hash of each stage.
    """
    columns = {
        "key": clips["key"],
        "source_id": clips["work_key"],
        "path": paths_of(clips["work_key"], first),
        "start_s": clips["start_s"],
        "end_s": clips["end_s"],
        "scores": scores,
        **verdicts.columns(hashes),
    }
    clip_rows = pa.table(columns).select(LEDGER.names).cast(LEDGER)
    without_clips = pa.table({"source_id": failed["work_key"], "path": paths_of(failed["work_key"], first)})
    unreadable = sources.filter(pc.is_null(sources["source_id"]))
    stands = contained(sources["path"], first["path"])
    again = sources.filter(pc.and_(pc.is_valid(sources["source_id"]), pc.invert(stands)))
    return pa.concat_tables(
        [
            clip_rows,
            _file_rows("failed", without_clips, failed["error"], split=hashes["split"]),
            _file_rows("failed", unreadable, unreadable["error"]),
            _file_rows("duplicate", again, list(map(exact_duplicate, again["source_id"].to_pylist()))),
        ]
    )


def removed_rows(removed: pa.Table) -> pa.Table:
    """Ledger rows of sources that were taken out of the dataset."""
    return _file_rows("rejected", removed, [REMOVED] * removed.num_rows)


def _file_rows(
    status: str, files: pa.Table, reasons: Sequence[str] | pa.ChunkedArray, *, split: str | None = None
) -> pa.Table:
    """Ledger rows of files without clips, of which ``path`` and ``source_id`` are known.

    Where the split stage of the hash ``split`` has seen them, they stand for their content, else for themselves.
    """
    paths, source_ids = files["path"].to_pylist(), files["source_id"].to_pylist()
    columns = {
        "key": source_ids if split else list(map(ledger_file_key, paths, source_ids)),
        "source_id": source_ids,
        "path": paths,
        "status": [status] * len(paths),
        "reason": reasons,
        "stage_hashes": [{"split": split}] * len(paths),
    }
    return pa.table({field.name: columns.get(field.name, [None] * len(paths)) for field in LEDGER}, schema=LEDGER)


def paths_of(source_ids: pa.ChunkedArray, first: pa.Table) -> pa.ChunkedArray:
    """The path that stands for each content."""
    return take(first["path"], positions(source_ids, first["source_id"]).to_numpy())


def count_reasons(pieces: Iterable[pa.Table]) -> dict[str, int]:
    """Rows of a ledger that were not kept by "status: class of reason", most frequent first."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        left = piece.filter(pc.not_equal(piece["status"], "kept"))
        what = pc.binary_join_element_wise(left["status"], reason_classes(left["reason"]), ": ")
        counts.update({count["values"]: count["counts"] for count in pc.value_counts(what).to_pylist()})
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_statuses(pieces: Iterable[pa.Table]) -> dict[str, int]:
    """Rows of a ledger by status, every status named."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update({count["values"]: count["counts"] for count in pc.value_counts(piece["status"]).to_pylist()})
    return {status: counts[status] for status in STATUSES}


def partition_keys(keys: pa.ChunkedArray) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Deal keys to parts by their first digits: the number of each part that has some, and their places, sorted by key.

    Which part a key is in depends on how many keys there are, on nothing else.
    """
    count = 1
    while count * _PART_ROWS < len(keys) and count < 16**_PREFIX_DIGITS:
        count *= 2
    bounds = (f"{number * 16**_PREFIX_DIGITS // count:0{_PREFIX_DIGITS}x}" for number in range(1, count))
    order = pc.sort_indices(keys).to_numpy().astype(np.int64)
    firsts = [bisect_left(order, bound, key=lambda place: keys[int(place)].as_py()) for bound in bounds]
    for number, places in enumerate(np.split(order, firsts)):
        if len(places):
            yield number, places


def ledger_path(number: int) -> str:
    """Where a part of a ledger is, relative to its snapshot."""
    return f"ledger/part-{number:05d}.parquet"


def write_ledger_part(uri: str, number: int, rows: pa.Table) -> LedgerPart:
    """Write a part, sorted already, of the ledger of a snapshot, whole or not at all."""
    path, data = ledger_path(number), parquet_bytes(rows, row_group_rows=LEDGER_ROW_GROUP_ROWS)
    storage.write_bytes_atomic(storage.join(uri, path), data)
    return LedgerPart(path, rows.num_rows, hashlib.sha256(data).hexdigest())


def look_at_part(uri: str, number: int, rows: int) -> LedgerPart:
    """What a manifest says of a part that is there."""
    path = ledger_path(number)
    return LedgerPart(path, rows, storage.sha256_file(storage.join(uri, path)))
