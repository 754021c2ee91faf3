"""Checking a published snapshot against its manifest and ledger, and some of its clips against their sources.

Nothing may be lost, doubled or changed since; what is decoded and encoded anew must be what the codes on disk show.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines import storage
from pipelines.data.reasons import reason_of
from pipelines.data.snapshot.ledger import count_statuses
from pipelines.data.snapshot.read import Bucket, Shard, Snapshot
from pipelines.data.snapshot.schemas import LATER_COLUMNS, LEDGER, TOKENS
from pipelines.data.stage.columns import contained, widened
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.codes import encoded_frames, snapshot_tokenizer
from pipelines.data.upkeep.stills import decode_clips
from pipelines.data.video.reader import MISMATCH
from pipelines.decoding.errors import VideoError
from pipelines.media import psnr
from pipelines.parquet import read_parquet

_EXAMPLES = 3  # named of each kind of problem
# By how much, dB, codes on disk may show their clip worse than codes made now; other devices and versions round
# otherwise, but codes of another clip are far off.
_TOLERANCE = 3.0


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
            ids += table["clip_id"].chunks
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
        table = read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        return None, [*problems, f"{path}: is no Parquet file ({error})"]
    schema = pa.schema(
        [field for field in schema if field.name in table.column_names or field.name not in LATER_COLUMNS]
    )
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
    info, tables = snapshot.manifest.ledger, []
    for part in info.parts:
        table, problems = _read(snapshot, part.path, part.sha256, LEDGER)
        yield from problems
        if table is None:
            return
        if table.num_rows != part.rows:
            yield f"{part.path}: {table.num_rows} rows, the manifest says {part.rows}"
        tables.append(table.select(["key", "status"]))
    ledger = pa.concat_tables([LEDGER.empty_table().select(["key", "status"]), *tables])
    counts = count_statuses([ledger])
    if ledger.num_rows != info.rows or counts != info.counts:
        yield f"ledger: rows by status are {counts}, the manifest says {info.counts}"
    keys = ledger["key"]
    if pc.any(pc.greater(keys[:-1], keys[1:])).as_py():
        yield "ledger: its rows are not sorted by key"
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))["key"]
    yield from _named(
        "kept by the ledger but in no shard", kept.filter(pc.invert(contained(kept, clip_ids))).to_pylist()
    )
    extra = clip_ids.filter(pc.invert(contained(clip_ids, kept)))
    yield from _named("in a shard but not kept by the ledger", extra.to_pylist())
    yield from _named("more than one ledger row", _repeated(ledger["key"]))


def _repeated(names: pa.ChunkedArray) -> list[str]:
    """Those that are there more than once."""
    counts = pc.value_counts(widened(names))
    repeated: list[str] = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()
    return repeated


def _named(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
        yield f"{what}: {', '.join(names[:_EXAMPLES])}{more}"


@dataclass(frozen=True)
class Recheck:
    """What was found of the clips that were looked at."""

    psnr: dict[str, float]  # dB of the codes on disk, decoded, against the source, by clip
    equal: float  # share of codes on disk that equal those made now
    skipped: dict[str, str]  # clips whose source is not at hand, and why
    problems: tuple[str, ...]  # one sentence each

    def __str__(self) -> str:
        lines = []
        if self.psnr:
            values = list(self.psnr.values())
            lines.append(
                f"{len(values)} clips decoded back: {np.mean(values):.1f} dB (lowest {min(values):.1f}); "
                f"{100 * self.equal:.2f} % of codes are what the tokenizer gives now"
            )
        lines += [f"not decoded back: {key}: {why}" for key, why in self.skipped.items()]
        return "\n".join([*lines, *self.problems])


def recheck(snapshot: Snapshot, count: int, tokenizer: str | None = None) -> Recheck:
    """Decode and encode some clips anew, chosen by a hash of their ids.

    The snapshot must lie in its dataset, as the stages know where the sources are. ``tokenizer`` is the file or folder
    of the one that made it, None the embedded one; a ``UserError`` if it is another, or not to be had.
    """
    loaded = snapshot_tokenizer(snapshot, tokenizer)
    if loaded is None:
        return Recheck({}, 0.0, {"all clips": "the tokenizer that made them is none of ours: name --tokenizer"}, ())
    clips = _choose(snapshot, count)
    found: dict[str, float] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    same: list[bool] = []

    for clip, frames in decode_clips(snapshot, clips, encoded_frames):
        if isinstance(frames, VideoError):
            if frames.code == MISMATCH:
                problems.append(f"{clip['key']} cannot be checked: {frames.detail}")
            else:
                skipped[clip["key"]] = reason_of(frames)
            continue
        shape = (1, clip["t"], clip["h"], clip["w"])
        stored = torch.from_numpy(np.array(clip["codes"], np.int64).reshape(shape))
        made = loaded.encode(torch.from_numpy(frames)[None])
        same += (stored == made).flatten().tolist()
        found[clip["key"]] = psnr(frames, loaded.decode(stored)[0].numpy())
        now = psnr(frames, loaded.decode(made)[0].numpy())
        if found[clip["key"]] < now - _TOLERANCE:
            compared = f"{found[clip['key']]:.1f} dB, codes made now {now:.1f} dB"
            problems.append(f"codes of {clip['key']} do not show their clip: {compared}")
    return Recheck(found, float(np.mean(same)) if same else 0.0, skipped, tuple(problems))


def _choose(snapshot: Snapshot, count: int) -> list[Row]:
    """Rows of the clips whose hash is lowest, with codes, in the order of their sources."""
    ranked = []
    for bucket in snapshot.manifest.buckets:
        for shard in bucket.shards:
            for place, key in enumerate(snapshot.read_shard(shard, ["clip_id"])["clip_id"].to_pylist()):
                ranked.append((hashlib.sha256(f"recheck:{key}".encode()).digest(), shard, place))
        ranked = sorted(ranked, key=lambda item: item[0])[:count]
    chosen = []
    for shard in dict.fromkeys(shard for _, shard, _ in ranked):
        table = snapshot.read_shard(shard)
        chosen += table.take([place for _, own, place in ranked if own == shard]).to_pylist()
    return [row | {"key": row["clip_id"]} for row in sorted(chosen, key=lambda row: row["clip_id"])]
