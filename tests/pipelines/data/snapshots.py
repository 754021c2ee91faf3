"""Snapshots written from arrays, by the real writer."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.settings import PublishConfig
from pipelines.data.snapshot.read import Snapshot, TokenizerInfo
from pipelines.data.snapshot.schemas import LEDGER
from pipelines.data.snapshot.shards import PUBLISHED_CLIPS
from pipelines.data.snapshot.write import SnapshotContent, draw_split, write_snapshot
from pipelines.data.stage.values import ValueGroup

TOKENIZER = TokenizerInfo("fsq", 1000, (4, 8, 8), "sha256:" + "0" * 64)


def snapshot_content(
    clips: Mapping[str, np.ndarray],
    captions: Mapping[str, Sequence[str]] | None = None,
    *,
    tokenizer: TokenizerInfo = TOKENIZER,
    config: PublishConfig | None = None,
) -> SnapshotContent:
    """What to publish for clips (id -> integer codes [t, h, w])."""
    config = config or PublishConfig()
    rows, ledger = [], []
    for clip_id, codes in clips.items():
        source = clip_id.partition(":")[0]
        texts = (captions or {}).get(clip_id, [f"the clip {clip_id}"])
        rows.append(
            {
                "clip_id": clip_id,
                "source_id": source,
                "split": draw_split(source, seed=config.seed, val_share=config.val_share),
                "captions": [{"text": text, "captioner": "test"} for text in texts],
                "fps": 12.0,
                **dict(zip("thw", codes.shape, strict=True)),
                "codes_sha256": hashlib.sha256(codes.astype("<u2").tobytes()).hexdigest(),
            }
        )
        ledger.append({"key": clip_id, "source_id": source, "path": source, "status": "kept", "reason": ""})
    return SnapshotContent(
        clips=pa.Table.from_pylist(rows, schema=PUBLISHED_CLIPS),
        code_groups=partial(_code_groups, clips),
        ledger=pa.Table.from_pylist(ledger, schema=LEDGER),
        tokenizer=tokenizer,
        created_from={"config": {}, "stage_hashes": {}},
    )


def _code_groups(clips: Mapping[str, np.ndarray]) -> Iterator[ValueGroup]:
    """Their codes in groups of seven."""
    codes = pa.array([grid.astype(np.uint16).ravel() for grid in clips.values()], pa.list_(pa.uint16()))
    for numbers in np.split(np.arange(len(clips)), range(7, len(clips), 7)):
        own = codes.take(pa.array(numbers))
        yield ValueGroup(numbers, partial(pa.chunked_array, [own]))


def make_snapshot(dataset: str, clips: Mapping[str, np.ndarray], *, config: PublishConfig | None = None) -> Snapshot:
    """Publish clips (id -> integer codes [t, h, w]) as a snapshot of the dataset at that path."""
    config = config or PublishConfig()
    return write_snapshot(dataset, snapshot_content(clips, config=config), config)


def as_version_1(snapshot: Snapshot) -> None:
    """Lay a snapshot out as programs did whose ledger was one file."""
    root, table = Path(snapshot.uri), snapshot.read_ledger()
    shutil.rmtree(root / "ledger")
    pq.write_table(table, root / "ledger.parquet")
    value = json.loads((root / "manifest.json").read_text())
    digest = hashlib.sha256((root / "ledger.parquet").read_bytes()).hexdigest()
    counts = value["ledger"]["counts"]
    value["ledger"] = {"path": "ledger.parquet", "rows": table.num_rows, "sha256": digest, "counts": counts}
    value["schema_version"] = 1
    (root / "manifest.json").write_text(json.dumps(value))
