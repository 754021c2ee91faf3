"""What a curation of very many clips takes of its driver, told on clips that nobody had to decode.

All of it is real, from the listing to the published snapshot, but for three functions that run in the workers: content
hashes, scores and codes are made up from names.
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lumos.tokenizers import TokenizerConfig
from pipelines.data.captions.captioner import CaptionSource
from pipelines.data.config import CurateConfig, TokenConfig
from pipelines.data.keys import clip_key
from pipelines.data.pipeline import Curation
from pipelines.data.settings import SourceConfig
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.stage import Row, RowFunction
from pipelines.data.steps.sources import list_sources
from pipelines.data.steps.tokens import load_tokenizer_info
from pipelines.data.video.fingerprint import DIMENSIONS
from pipelines.memory import own_memory, sampled_memory

_CLIPS_PER_SOURCE = 10
_CLIP_SECONDS = 3.0
_THUMBNAILS = 6
_STILL = 10  # of so many clips, one shows no motion and is rejected
_SAMPLE_SECONDS = 0.05
_TOKENS = TokenConfig(num_frames=(5,), sizes=("64x64",), decode_back_share=0.0)
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
    for number in range(_CLIPS_PER_SOURCE):
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
                "fingerprint": generator.integers(0, 256, _THUMBNAILS * DIMENSIONS, np.uint8).tobytes(),
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
        made.append({"work_key": row["work_key"], "key": row["key"], "fps": _TOKENS.fps, **grid})
    return made


def write_manifest(path: Path, count: int) -> None:
    """A table of so many sources that nobody opens."""
    names = pa.array([f"s3://bucket/folder/video-{number:08d}.mp4" for number in range(count)])
    pq.write_table(pa.table({"path": names}), path)


def measure_curation(root: Path, clips: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Curate a manifest whose sources hold so many clips, twice: all of it, then with nothing left to do.

    Works below ``root``, and calls ``say`` with a line about each figure. Returns seconds of both runs, and MB by which
    the driver grew.
    """
    say(f"curation of {clips} clips that nobody decodes")
    manifest, dataset = root / "videos.parquet", str(root / "curated")
    write_manifest(manifest, -(-clips // _CLIPS_PER_SOURCE))
    config = CurateConfig(dataset=dataset, source=SourceConfig(path=str(manifest)), tokens=_TOKENS, progress=False)
    found: dict[str, Any] = {"clips": clips}
    for name in ("all", "nothing"):
        with sampled_memory(own_memory, _SAMPLE_SECONDS) as memory:
            begin = time.perf_counter()
            kept = _curate(config)
            seconds = time.perf_counter() - begin
        found[name] = {"kept": kept, "seconds": seconds, "driver_growth_mb": (max(memory) - memory[0]) / 1e6}
        say(f"  {name} to do: {seconds:.0f} s, driver grew by {found[name]['driver_growth_mb']:.0f} MB, kept {kept}")
    return found


def _curate(config: CurateConfig) -> int:
    """As ``lumos curate`` does it; how many clips were kept."""
    listing = list_sources(config.source)
    said = "a clip of a video, which somebody described in so many words: "
    texts: dict[str, tuple[str, ...]] = {uri: (said + uri,) for uri in listing["uri"].to_pylist()}
    curation = Curation(config, CaptionSource("metadata", texts), load_tokenizer_info(TokenizerConfig()))
    for name, function in (("sources", make_up_hashes), ("split", make_up_clips), ("tokens", make_up_codes)):
        curation.stages[name] = replace(curation.stages[name], function=partial(stateless, function=function))
    content = curation.content(curation.run(listing, RunLog(config.dataset)))
    return write_snapshot(config.dataset, content, config.publish).manifest.ledger.counts["kept"]
