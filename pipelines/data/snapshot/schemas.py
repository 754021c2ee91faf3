"""Columns of the tables that curation writes."""

import pyarrow as pa

SCHEMA_VERSION = 1  # of published snapshots

# What the low-resolution pass measures of a clip (video/meter.py says how). All are stored; which of them
# decide is the thresholds' matter.
PASS_SCORES = (
    "image",  # 1 for an image, 0 for a video
    "duration",
    "fps",
    "width",
    "height",
    "aspect",
    "picture_share",
    "declared_frames",
    "decoded_frames",
    "decoded_share",
    "brightness",
    "dark_share",
    "flash_share",
    "repeat_share",
    "freeze",
    "sharpness",
    "motion",
    "motion_time",
)
# What models say of the clips that the other scores keep (steps/features.py), and how well the tokenizer does
# on a sample of them (steps/tokens.py); null where nobody looked.
MODEL_SCORES = ("text_area", "aesthetic", "nsfw", "similarity", "psnr")
SCORES = (*PASS_SCORES, *MODEL_SCORES)
# The stages whose configuration a ledger row names.
STAGES = ("split", "features", "captions", "tokens")

# All tables' stages, in the order of the work.
WORK_ORDER = (
    "sources",
    "split",
    "looks",
    "features",
    "captions",
    "captions-coca",
    "captions-endpoint",
    "texts",
    "tokens",
)

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
    ]
)

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


def stage_place(name: str) -> int:
    """Where a stage comes in the order of the work."""
    return WORK_ORDER.index(name) if name in WORK_ORDER else len(WORK_ORDER)
