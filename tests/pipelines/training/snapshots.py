"""Small snapshots written straight from the schema in contracts, with codes a small model can learn."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CODEBOOK = 64
_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("source_id", pa.string()),
        ("split", pa.string()),
        ("captions", pa.list_(pa.struct([("text", pa.string()), ("captioner", pa.string())]))),
        ("fps", pa.float32()),
        ("t", pa.int16()),
        ("h", pa.int16()),
        ("w", pa.int16()),
        ("codes", pa.list_(pa.uint16())),
    ]
)


def write_snapshot(
    folder: Path,
    buckets: Mapping[tuple[int, int, int], int],
    *,
    rows_per_shard: int = 5,
    tokenizer_hash: str = "sha256:test",
    codebook_size: int = CODEBOOK,
    held_out: Mapping[tuple[int, int, int], int] | None = None,
    captions: Sequence[str] = (),
) -> Path:
    """A dataset with one snapshot of ``buckets`` (latent shape -> training rows); returns the dataset's folder.

    ``held_out`` are likewise rows of the split val. Rows of a bucket have ``captions`` in turn, if there are any.
    """
    snapshot = folder / "snapshots" / "v0001-00000000"
    splits = {"train": buckets, "val": held_out or {}}
    entries = [
        _write_bucket(
            snapshot, split, shape, [_record(split, shape, row, captions) for row in range(rows)], rows_per_shard
        )
        for split, of_split in splits.items()
        for shape, rows in of_split.items()
    ]
    totals = {
        split: {"rows": sum(rows.values()), "tokens": sum(n * int(np.prod(shape)) for shape, n in rows.items())}
        for split, rows in splits.items()
    }
    ledger = snapshot / "ledger.parquet"
    pq.write_table(pa.table({"key": pa.array([], pa.string())}), ledger)
    manifest = {
        "schema_version": 1,
        "snapshot_id": snapshot.name,
        "parents": [],
        "created_from": {"config": {}, "stage_hashes": {}},
        "tokenizer": {
            "kind": "fsq",
            "codebook_size": codebook_size,
            "compression": [4, 8, 8],
            "weights_hash": tokenizer_hash,
        },
        "captioners": ["test"],
        "buckets": entries,
        "totals": totals,
        "ledger": {"path": ledger.name, "rows": 0, "sha256": _sha256(ledger), "counts": {}},
    }
    (snapshot / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _write_bucket(
    snapshot: Path, split: str, shape: tuple[int, int, int], rows: list[dict[str, object]], rows_per_shard: int
) -> dict[str, object]:
    t, h, w = shape
    shards = []
    for number, first in enumerate(range(0, len(rows), rows_per_shard)):
        records = rows[first : first + rows_per_shard]
        path = snapshot / f"data/{split}/{t}x{h}x{w}/shard-{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records, schema=_SCHEMA), path, compression="zstd")
        size = path.stat().st_size
        relative = str(path.relative_to(snapshot))
        shards.append({"path": relative, "rows": len(records), "bytes": size, "sha256": _sha256(path)})
    size = sum(int(str(shard["bytes"])) for shard in shards)
    return {"split": split, "t": t, "h": h, "w": w, "rows": len(rows), "bytes": size, "shards": shards}


def _record(split: str, shape: tuple[int, int, int], row: int, captions: Sequence[str]) -> dict[str, object]:
    """Codes follow the caption's number, so that there is something to learn."""
    t, h, w = shape
    kind = row % 4
    codes = (np.arange(t * h * w) * (kind + 1) + kind) % CODEBOOK
    name = f"{t}x{h}x{w}-{row:05d}" if split == "train" else f"{split}-{t}x{h}x{w}-{row:05d}"
    texts = [captions[row % len(captions)]] if captions else [f"pattern {kind}", f"the pattern called {kind}"]
    return {
        "clip_id": name,
        "source_id": f"source-{name}",
        "split": split,
        "captions": [{"text": text, "captioner": "test"} for text in texts],
        "fps": 12.0,
        "t": t,
        "h": h,
        "w": w,
        "codes": codes.astype(np.uint16),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
