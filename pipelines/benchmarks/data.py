"""How close the data pipeline comes to its floors, and what a row costs when nothing is done with it.

Every figure is taken on the functions that `lumos curate` itself calls. Ratios compare times of one run, taken in
turns; the medians count.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from lumos.tokenizers import TokenizerConfig, load_video_tokenizer
from pipelines.benchmarks.curation import measure_curation, write_manifest
from pipelines.benchmarks.machine import describe_machine, product_ms, ratio
from pipelines.benchmarks.made_up import stateless
from pipelines.cluster import connect
from pipelines.data.config import CurateConfig, TokenConfig
from pipelines.data.settings import DecodeConfig, SourceConfig, SplitConfig
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.run import run_stage
from pipelines.data.stage.stage import Row, Stage, StageResources
from pipelines.data.stage.table import PART, StageTable
from pipelines.data.steps.clips import Clips
from pipelines.data.steps.sources import list_sources
from pipelines.data.steps.split import CLIPS, split_stage
from pipelines.data.steps.tokens import TOKENIZED, load_tokenizer_info, token_inputs, tokens_stage
from pipelines.data.video.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.frames import REQUEST_COLUMNS
from pipelines.data.video.reader import ClipRequest, read_clip
from pipelines.memory import own_memory, sampled_memory

_SIZE = (1280, 720)
_FPS = 30
_SHOT_SECONDS = 3
_SHOTS = 3
_NULL = pa.schema([("work_key", pa.string())])
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class DataBenchmarkConfig:
    """How much is measured."""

    repeats: int  # times of each ratio; medians count
    copies: int  # of the film that is scored and tokenized, 9 s at 1280x720
    null_rows: int  # rows of the manifest that goes through a stage which does nothing
    clips: int  # of a curation in which nothing is decoded


def render_film(path: Path) -> None:
    """A film of a few shots: textures that move behind moving boxes, with grain, as H.264."""
    generator = np.random.default_rng(0)
    width, height = _SIZE
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "21"}
        for _ in range(_SHOTS):
            coarse = generator.integers(30, 220, (height // 20 + 8, width // 20 + 30, 3)).astype(np.uint8)
            wall = np.kron(coarse, np.ones((20, 20, 1), np.uint8))
            grain = generator.normal(0, 3, (height, width, 1)).astype(np.int16)
            for index in range(_SHOT_SECONDS * _FPS):
                frame = wall[index : index + height, 3 * index : 3 * index + width].astype(np.int16) + grain
                left = (11 * index) % (width - 200)
                frame[200:400, left : left + 200] = (240, 60, 40)
                picture = np.clip(frame, 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


class DecodeOnly:
    """As the split stage's function, but the child only decodes and scales."""

    def __init__(self, uri: str, *, target: int) -> None:
        self.target = target
        self.child = DecodeChild(DecodeConfig(), CrashLog(f"{uri}/crashes"))

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """An empty row for each source."""
        function = "pipelines.benchmarks.floors:decode_only"
        jobs = [DecodeJob(row["work_key"], function, {"path": row["uri"], "target": self.target}) for row in rows]
        return [{"work_key": row["work_key"]} for row, _ in zip(rows, self.child.run(jobs), strict=True)]


class DecodeAndEncode:
    """As the token stage's function, but plainly one after another, in one process."""

    def __init__(self, uri: str, *, config: TokenConfig) -> None:
        del uri
        torch.set_num_threads(1)
        self.config = config
        self.tokenizer = load_video_tokenizer(config.tokenizer)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """An empty row for each clip."""
        for row in rows:
            columns = {name: row[name] for name in ("num_frames", "width", "height", *REQUEST_COLUMNS)}
            frames = read_clip(ClipRequest(path=row["uri"], fps=self.config.fps, **columns), beat=lambda: None)
            self.tokenizer.encode(torch.from_numpy(frames)[None])
        return [{"work_key": row["work_key"], "key": row["key"]} for row in rows]


def do_nothing(rows: Sequence[Row]) -> list[Row]:
    """The keys."""
    return [{"work_key": row["work_key"]} for row in rows]


def run_data_benchmark(config: DataBenchmarkConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; ``say`` is called with a line about each figure.

    Returns:
        JSON-able: ``clips``, ``seconds``, ``driver_growth_mb`` and ``worker_peak_mb`` of a curation that decodes
        nothing; ``score_pass_vs_floor``, ``tokenize_vs_floor``, ``null_row_ms``, ``null_driver_growth_mb``; under
        ``raw`` the samples behind them; machine, versions, and the product's time before and after.
    """
    before = product_ms()
    with tempfile.TemporaryDirectory(prefix="lumos-benchmark-") as folder, connect():
        root = Path(folder)
        curated = measure_curation(root, config.clips, say)  # first, while the driver holds nothing else
        film = root / "film.mp4"
        say("rendering the film")
        render_film(film)
        sources = pa.table(
            {"work_key": [f"s{number}" for number in range(config.copies)], "uri": [str(film)] * config.copies}
        )
        scored = _score_pass(sources, root, config, say)
        tokenized = _tokenize(sources, root, config, say)
        rows = _null_rows(root, config, say)
    figures = {
        "score_pass_vs_floor": ratio(scored["floor_s"], scored["stage_s"]),
        "tokenize_vs_floor": ratio(tokenized["floor_s"], tokenized["stage_s"]),
        "null_row_ms": rows["null_row_ms"],
        "null_driver_growth_mb": rows["driver_growth_mb"],
        "clips": config.clips,
        **{name: round(curated["all"][name], 1) for name in ("seconds", "driver_growth_mb", "worker_peak_mb")},
    }
    return {
        "schema": 1,
        **figures,
        "raw": {"score_pass": scored, "tokenize": tokenized, "null": rows, "curation": curated},
        "config": vars(config),
        "machine": describe_machine(),
        "product_ms": {"before": before, "after": product_ms()},
    }


def _in_turns(
    stages: dict[str, Stage], inputs: pa.Table, root: Path, config: DataBenchmarkConfig, say: Callable[[str], None]
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in stages}
    for repeat in tqdm(range(config.repeats), desc=" and ".join(stage.name for stage in stages.values()), unit="round"):
        for name, stage in stages.items():
            dataset = str(root / f"{stage.name}-{repeat}")
            log = RunLog(dataset)
            run_stage(stage, inputs, dataset=dataset, log=log)
            samples[name].append(log.stages[stage.name].busy_s)  # of work, the start of processes left out
    for name, seconds in samples.items():
        say(f"  {name} {statistics.median(seconds):.2f} s")
    return samples


def _score_pass(
    sources: pa.Table, root: Path, config: DataBenchmarkConfig, say: Callable[[str], None]
) -> dict[str, list[float]]:
    say("score pass against decoding alone, seconds of work")
    split, resources = SplitConfig(), StageResources()
    floor = Stage(
        name="floor-split",
        settings={},
        schema=CLIPS,
        function=partial(DecodeOnly, target=split.width),
        rows_per_part=32,
        resources=resources,
    )
    return _in_turns(
        {"floor_s": floor, "stage_s": split_stage(split, DecodeConfig(), resources)}, sources, root, config, say
    )


def _tokenize(
    sources: pa.Table, root: Path, config: DataBenchmarkConfig, say: Callable[[str], None]
) -> dict[str, list[float]]:
    say("tokenizing against decode and encoder calls alone, seconds of work")
    split = split_stage(SplitConfig(), DecodeConfig(), StageResources())
    run_stage(split, sources, dataset=str(root / "clips"))
    tokens = TokenConfig(decode_back_share=0.0)
    curate = CurateConfig(dataset="-", source=SourceConfig(path="-"), tokens=tokens)
    table = StageTable(str(root / "clips"), split)
    rows = table.read([*CLIPS.names, PART])
    clips = Clips(rows, pa.chunked_array([[sources["uri"][0].as_py()] * rows.num_rows]), table.parts())
    clips.plan_shapes(tokens)
    inputs = token_inputs(clips.of(clips.verdicts.kept), clips.shapes[clips.verdicts.kept], 0.0)
    floor = Stage(
        name="floor-tokens",
        settings={},
        schema=TOKENIZED,
        function=partial(DecodeAndEncode, config=tokens),
        rows_per_part=64,
    )
    stage = tokens_stage(curate, load_tokenizer_info(TokenizerConfig()))
    return _in_turns({"floor_s": floor, "stage_s": stage}, inputs, root, config, say)


def _null_rows(root: Path, config: DataBenchmarkConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """A manifest of many rows listed and put through a stage that does nothing."""
    say(f"{config.null_rows} manifest rows through a stage that does nothing")
    manifest = root / "manifest.parquet"
    write_manifest(manifest, config.null_rows)
    stage = Stage(
        name="null",
        settings={},
        schema=_NULL,
        function=partial(stateless, function=do_nothing),
        rows_per_part=8192,
        min_rows_per_part=4096,
        stateful=False,
    )
    run_stage(stage, pa.table({"work_key": ["a", "b"]}), dataset=str(root / "warm"))
    seconds, growth = [], []
    for repeat in range(config.repeats):
        with sampled_memory(own_memory, _SAMPLE_SECONDS) as memory:
            listing = list_sources(SourceConfig(path=str(manifest)))
            begin = time.perf_counter()
            run_stage(stage, listing, dataset=str(root / f"null-{repeat}"))
            seconds.append(time.perf_counter() - begin)
            del listing
        growth.append((max(memory) - memory[0]) / 1e6)
    found: dict[str, Any] = {
        "null_row_ms": round(1e3 * statistics.median(seconds) / config.null_rows, 5),
        "driver_growth_mb": round(max(growth), 1),  # most of it in the first round; later ones find memory at hand
        "seconds": seconds,
        "growth_mb": growth,
    }
    say(f"  {found['null_row_ms']} ms a row, driver grew by {found['driver_growth_mb']} MB")
    return found
