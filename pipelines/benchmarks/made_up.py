"""Results of stages made up from names, for a curation in which nothing is decoded. Light, as workers import it."""

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from pipelines.data.keys import clip_key
from pipelines.data.stage.stage import Row, RowFunction

CLIPS_PER_SOURCE = 10
FPS = 12.0
_CLIP_SECONDS = 3.0
_PRINT_BYTES = 6 * 192  # of a fingerprint
_MOVEMENT_BYTES = 2 + 18 * 32  # of what moves
_STILL = 10  # of so many clips, one shows no motion and is rejected
_GRID = (2, 8, 8)


def stateless(uri: str, *, function: RowFunction) -> RowFunction:
    """As a stage's function: one that holds nothing between batches."""
    del uri
    return function


def make_up_hashes(rows: Sequence[Row]) -> list[Row]:
    """In the sources stage: a hash of each file's name."""
    return [{"work_key": row["work_key"], "source_id": hashlib.sha256(row["uri"].encode()).hexdigest()} for row in rows]


def make_up_clips(rows: Sequence[Row]) -> list[Row]:
    """In the split stage: some clips of each source."""
    return [clip for row in rows for clip in _clips(row["work_key"])]


def _clips(source_id: str) -> list[Row]:
    generator = np.random.default_rng(int(source_id[:12], 16))
    clips = []
    for number in range(CLIPS_PER_SOURCE):
        start = number * _CLIP_SECONDS
        scores = {
            **dict.fromkeys(("image", "dark_share", "flash_share", "repeat_share", "freeze"), 0.0),
            **dict.fromkeys(("picture_share", "decoded_share"), 1.0),
            **dict.fromkeys(("declared_frames", "decoded_frames"), 720.0),
            "duration": _CLIP_SECONDS,
            "fps": 24.0,
            "width": 1280.0,
            "height": 720.0,
            "aspect": 16 / 9,
            "brightness": 0.5,
            "sharpness": float(generator.uniform(100, 1000)),
            "motion": float(generator.uniform(0.1, 0.9)),
            "motion_time": float(generator.integers(_STILL) > 0),
        }
        clips.append(
            {
                "work_key": source_id,
                "key": clip_key(source_id, start, start + _CLIP_SECONDS),
                "start_s": start,
                "end_s": start + _CLIP_SECONDS,
                "scores": scores,
                "fingerprint": generator.integers(0, 256, _PRINT_BYTES, np.uint8).tobytes(),
                "movement": generator.integers(0, 256, _MOVEMENT_BYTES, np.uint8).tobytes(),
                "codec": "h264",
                "pixel_format": "yuv420p",
                "pixel_aspect": 1.0,
                "rotation": 0,
                "picture": [0, 0, 1280, 720],
                "origin_s": 0.0,
                "clean_clock": True,
                "source_frames": 720,
            }
        )
    return clips


def make_up_codes(rows: Sequence[Row]) -> list[Row]:
    """In the token stage: a grid of each clip."""
    t, h, w = _GRID
    made = []
    for row in rows:
        codes = np.random.default_rng(zlib.crc32(row["key"].encode())).integers(0, 100, t * h * w).astype("<u2")
        grid = {"t": t, "h": h, "w": w, "codes": codes, "codes_sha256": hashlib.sha256(codes.tobytes()).hexdigest()}
        made.append({"work_key": row["work_key"], "key": row["key"], "fps": FPS, **grid})
    return made
