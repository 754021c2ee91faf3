"""Columns of the tables that curation writes."""

import pyarrow as pa

from pipelines.data.scores import SCORES

SCHEMA_VERSION = 2  # of published snapshots; the ledger of version 1 is a single file

# The stages whose configuration a ledger row names.
STAGES = ("split", "features", "captions", "tokens")

STATUSES = ("kept", "rejected", "failed", "duplicate")

CAPTIONS = pa.list_(pa.struct([pa.field("text", pa.string()), pa.field("captioner", pa.string())]))

# One clip of a published shard. Readers may rely on these; further columns may follow.
TOKENS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("captions", CAPTIONS),
        pa.field("fps", pa.float32(), nullable=False),
        pa.field("t", pa.int16(), nullable=False),
        pa.field("h", pa.int16(), nullable=False),
        pa.field("w", pa.int16(), nullable=False),
        pa.field("codes", pa.list_(pa.uint16()), nullable=False),
        pa.field("motion", pa.float32()),  # the score of that name; null for an image, and where it was not measured
    ]
)
LATER_COLUMNS = ("motion",)  # that shards of older programs lack

# What became of every clip, and of every source that yields none.
LEDGER = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
        pa.field("path", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("scores", pa.struct([pa.field(name, pa.float64()) for name in SCORES])),
        pa.field("stage_hashes", pa.struct([pa.field(name, pa.string()) for name in STAGES])),
    ]
)
