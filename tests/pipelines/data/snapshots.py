"""Snapshots written from arrays, by the real writer."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipelines.data.snapshot.read import Snapshot, TokenizerInfo
from pipelines.data.snapshot.schemas import LEDGER
from pipelines.data.snapshot.write import PUBLISHED_CLIPS, PublishConfig, SnapshotContent, draw_split, write_snapshot

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
        read_codes=lambda shards: [
            pa.array([clips[i].astype(np.uint16).ravel() for i in ids.to_pylist()], pa.list_(pa.uint16()))
            for ids in shards
        ],
        ledger=pa.Table.from_pylist(ledger, schema=LEDGER),
        tokenizer=tokenizer,
        created_from={"config": {}, "stage_hashes": {}},
    )


def make_snapshot(dataset: str, clips: Mapping[str, np.ndarray], *, config: PublishConfig | None = None) -> Snapshot:
    """Publish clips (id -> integer codes [t, h, w]) as a snapshot of the dataset at that path."""
    config = config or PublishConfig()
    return write_snapshot(dataset, snapshot_content(clips, config=config), config)
