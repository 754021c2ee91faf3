"""What a curation of very many clips takes of its driver, told on clips that nobody had to decode.

All of it is real, from the listing to the published snapshot, but for three functions that run in the workers: content
hashes, scores and codes are made up from names.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from lumos.tokenizers import TokenizerConfig
from pipelines.benchmarks.made_up import CLIPS_PER_SOURCE, FPS, make_up_clips, make_up_codes, make_up_hashes, stateless
from pipelines.data.captions.captioner import CaptionSource
from pipelines.data.config import CurateConfig, TokenConfig
from pipelines.data.pipeline import Curation
from pipelines.data.settings import SourceConfig
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.stage.log import RunLog
from pipelines.data.steps.sources import list_sources
from pipelines.data.steps.tokens import load_tokenizer_info
from pipelines.memory import own_memory, sampled_memory

_SAMPLE_SECONDS = 0.05
_WORKER_SAMPLE_SECONDS = 0.5  # looking at all processes takes some milliseconds
_TOKENS = TokenConfig(fps=FPS, num_frames=(5,), sizes=("64x64",), decode_back_share=0.0)


def write_manifest(path: Path, count: int) -> None:
    """A table of so many sources that nobody opens."""
    names = pa.array([f"s3://bucket/folder/video-{number:08d}.mp4" for number in range(count)])
    pq.write_table(pa.table({"path": names}), path)


def measure_curation(root: Path, clips: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Curate a manifest whose sources hold so many clips, twice: all of it, then with nothing left to do.

    Works below ``root``, and calls ``say`` with a line about each figure. Returns seconds of both runs, MB by which the
    driver grew, and MB that the largest worker held, pages of Ray's store that it read among them.
    """
    say(f"curation of {clips} clips that nobody decodes")
    manifest, dataset = root / "videos.parquet", str(root / "curated")
    write_manifest(manifest, -(-clips // CLIPS_PER_SOURCE))
    config = CurateConfig(dataset=dataset, source=SourceConfig(path=str(manifest)), tokens=_TOKENS, progress=False)
    found: dict[str, Any] = {"clips": clips}
    for name in ("all", "nothing"):
        with (
            sampled_memory(own_memory, _SAMPLE_SECONDS) as memory,
            sampled_memory(_largest_worker, _WORKER_SAMPLE_SECONDS) as workers,
        ):
            begin = time.perf_counter()
            kept = _curate(config)
            seconds = time.perf_counter() - begin
        growth, peak = (max(memory) - memory[0]) / 1e6, max(workers) / 1e6
        found[name] = {"kept": kept, "seconds": seconds, "driver_growth_mb": growth, "worker_peak_mb": peak}
        say(f"  {name} to do: {seconds:.0f} s, driver grew by {growth:.0f} MB, worker {peak:.0f} MB, kept {kept}")
    return found


def _largest_worker() -> float:
    """Bytes that the largest of Ray's workers has in memory."""
    largest = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                largest = max(largest, float(process.memory_info().rss))
    return largest


def _curate(config: CurateConfig) -> int:
    """As ``lumos curate`` does it; how many clips were kept."""
    listing = list_sources(config.source)
    said = "a clip of a video, which somebody described in so many words: "
    texts: dict[str, tuple[str, ...]] = {uri: (said + uri,) for uri in listing["uri"].to_pylist()}
    curation = Curation(config, CaptionSource("metadata", texts), load_tokenizer_info(TokenizerConfig()))
    for name, function in (("sources", make_up_hashes), ("split", make_up_clips), ("tokens", make_up_codes)):
        curation.stages[name] = replace(
            curation.stages[name], function=partial(stateless, function=function), stateful=False
        )
    content = curation.content(curation.run(listing, RunLog(config.dataset)))
    return write_snapshot(config.dataset, content, config.publish).manifest.ledger.counts["kept"]
