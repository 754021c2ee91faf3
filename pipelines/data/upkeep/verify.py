"""Checking a published snapshot against its manifest and ledger: nothing lost, doubled or changed since."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.data.snapshot.read import Bucket, Shard, Snapshot
from pipelines.data.snapshot.schemas import LEDGER, TOKENS
from pipelines.data.snapshot.write import count_statuses

_EXAMPLES = 3  # named of each kind of problem


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it."""

    shards: int  # token files read
    rows: int  # their rows
    tokens: int  # codes in those
    problems: tuple[str, ...]  # one sentence each, with the file or clips it is about; none if all is well

    def __str__(self) -> str:
        head = f"{self.shards} shards, {self.rows} clips, {self.tokens} tokens: "
        return "\n".join([head + (f"{len(self.problems)} problems" if self.problems else "all well"), *self.problems])


def verify_snapshot(snapshot: Snapshot) -> Verification:
    """Read every file of a snapshot and check it.

    Sizes and SHA-256 against the manifest; columns; that codes fit their grid and codebook; that every clip the ledger
    keeps is in exactly one shard, of its split and shape, and no other is; that no source is in two splits.
    """
    problems: list[str] = []
    ids: list[pa.Array] = []
    sources: dict[str, list[pa.Array]] = {"train": [], "val": []}
    shards = rows = tokens = 0
    for bucket in snapshot.manifest.buckets:
        if sum(shard.rows for shard in bucket.shards) != bucket.rows:
            problems.append(f"manifest: bucket {bucket.split} {bucket.t}x{bucket.h}x{bucket.w} has another sum of rows")
        for shard in bucket.shards:
            table, found = _read(snapshot, shard.path, shard.sha256, TOKENS)
            problems += found
            if table is None:
                continue
            problems += _check_shard(snapshot, bucket, shard, table)
            shards, rows = shards + 1, rows + table.num_rows
            tokens += table.num_rows * bucket.t * bucket.h * bucket.w
            ids.append(table["clip_id"].combine_chunks())
            sources.setdefault(bucket.split, []).append(pc.unique(table["source_id"]))
    clip_ids = pa.chunked_array(ids, pa.string())
    problems += _named("in more than one row", _repeated(clip_ids))
    train, val = (pc.unique(pa.chunked_array(sources[split], pa.string())) for split in ("train", "val"))
    problems += _named("source in both splits", sorted(train.filter(pc.is_in(train, val)).to_pylist()))
    problems += _check_ledger(snapshot, clip_ids)
    for split, total in snapshot.manifest.totals.items():
        if total.rows != sum(bucket.rows for bucket in snapshot.manifest.buckets if bucket.split == split):
            problems.append(f"manifest: total of {split} is not the sum of its buckets")
    return Verification(shards, rows, tokens, tuple(problems))


def _read(snapshot: Snapshot, path: str, sha256: str, schema: pa.Schema) -> tuple[pa.Table | None, list[str]]:
    try:
        data = storage.read_bytes(storage.join(snapshot.uri, path))
    except OSError as error:
        return None, [f"{path}: cannot be read ({type(error).__name__})"]
    found = hashlib.sha256(data).hexdigest()
    problems = [] if found == sha256 else [f"{path}: SHA-256 is {found[:12]}..., the manifest says {sha256[:12]}..."]
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        return None, [*problems, f"{path}: is no Parquet file ({error})"]
    lacking = [name for name in schema.names if name not in table.column_names]
    if lacking:
        return None, [*problems, f"{path}: lacks the columns {', '.join(lacking)}"]
    try:
        return table.select(schema.names).cast(schema), problems
    except (pa.ArrowException, ValueError) as error:
        return None, [*problems, f"{path}: {error}"]


def _check_shard(snapshot: Snapshot, bucket: Bucket, shard: Shard, table: pa.Table) -> Iterator[str]:
    if table.num_rows != shard.rows:
        yield f"{shard.path}: {table.num_rows} rows, the manifest says {shard.rows}"
    for name in ("split", "t", "h", "w"):
        if not pc.all(pc.equal(table[name], getattr(bucket, name))).as_py() and table.num_rows:
            yield f"{shard.path}: rows of another {name} than its bucket's {getattr(bucket, name)}"
    lengths = pc.list_value_length(table["codes"])
    wrong = pc.not_equal(lengths, bucket.t * bucket.h * bucket.w)
    if pc.any(wrong).as_py():
        yield from _named(f"codes do not fill the grid, in {shard.path}", table["clip_id"].filter(wrong).to_pylist())
    codes = np.concatenate([chunk.flatten().to_numpy() for chunk in table["codes"].chunks] or [np.zeros(0, np.uint16)])
    size = snapshot.manifest.tokenizer.codebook_size
    if len(codes) and int(codes.max()) >= size:
        yield f"{shard.path}: code {codes.max()} is outside the codebook of {size}"


def _check_ledger(snapshot: Snapshot, clip_ids: pa.ChunkedArray) -> Iterator[str]:
    info = snapshot.manifest.ledger
    ledger, problems = _read(snapshot, info.path, info.sha256, LEDGER)
    yield from problems
    if ledger is None:
        return
    if ledger.num_rows != info.rows or count_statuses(ledger) != info.counts:
        yield f"{info.path}: rows by status are {count_statuses(ledger)}, the manifest says {info.counts}"
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))["key"]
    yield from _named(
        "kept by the ledger but in no shard", kept.filter(pc.invert(pc.is_in(kept, clip_ids))).to_pylist()
    )
    extra = clip_ids.filter(pc.invert(pc.is_in(clip_ids, kept.combine_chunks())))
    yield from _named("in a shard but not kept by the ledger", extra.to_pylist())
    yield from _named("more than one ledger row", _repeated(ledger["key"]))


def _repeated(names: pa.ChunkedArray) -> list[str]:
    """Those that are there more than once."""
    counts = pc.value_counts(names)
    repeated: list[str] = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()
    return repeated


def _named(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
        yield f"{what}: {', '.join(names[:_EXAMPLES])}{more}"
