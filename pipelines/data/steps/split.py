"""The split stage: from a source to its measured clips, the one fan-out."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.config import CurateConfig
from pipelines.data.keys import clip_key
from pipelines.data.scores import scores_of
from pipelines.data.settings import DecodeConfig, SplitConfig
from pipelines.data.stage.columns import sort
from pipelines.data.stage.run import TooManyFailuresError
from pipelines.data.stage.stage import WORK, Row, Stage, StageResources
from pipelines.data.stage.table import PART
from pipelines.data.steps.clips import Clips
from pipelines.data.steps.run import Run, Step
from pipelines.data.video.decode import CRASHES, CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.local_files import LocalFiles
from pipelines.data.video.reader import DecodedSource, VideoError

# ``key`` is null in the one row of a source that yields no clip; ``error`` says why then.
CLIPS = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),  # the source's content hash
        pa.field("key", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("scores", pa.struct([pa.field(score.name, pa.float64()) for score in scores_of("split")])),
        pa.field("fingerprint", pa.binary()),  # thumbnails, see duplicates.py
        pa.field("codec", pa.string()),
        pa.field("pixel_format", pa.string()),
        pa.field("pixel_aspect", pa.float64()),
        pa.field("rotation", pa.int16()),
        pa.field(
            "picture", pa.list_(pa.int32())
        ),  # left, top, width, height between black bars, px of the upright frame
        pa.field("origin_s", pa.float64()),
        pa.field("clean_clock", pa.bool_()),
        pa.field("source_frames", pa.int64()),
        pa.field("error", pa.string()),
    ]
)


class SplitFunction:
    """Decodes sources in a child process and turns each into the rows of its clips."""

    def __init__(self, uri: str, *, config: SplitConfig, decode: DecodeConfig) -> None:
        self.config = config
        self.child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)), weights=config.weights)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Clips of each source."""
        files = LocalFiles()
        clips: list[Row] = []
        for row, result in zip(rows, self.child.run(self._jobs(rows, files)), strict=True):
            clips += clip_rows(row["work_key"], result)
            files.release(row["uri"])
        return clips

    def _jobs(self, rows: Sequence[Row], files: LocalFiles) -> Iterator[DecodeJob | VideoError]:
        for row in rows:
            try:
                path = files.path(row["uri"])
            except VideoError as error:
                yield error
                continue
            yield DecodeJob(row["work_key"], "split", {"path": path, "config": self.config})


def clip_rows(source_id: str, result: DecodedSource | VideoError) -> list[Row]:
    """The rows that a source leaves in the table."""
    if isinstance(result, VideoError):
        return [{"work_key": source_id, "error": result.reason}]
    shared: dict[str, Any] = {
        "work_key": source_id,
        "codec": result.info.codec,
        "pixel_format": result.info.pixel_format,
        "pixel_aspect": result.info.pixel_aspect,
        "rotation": result.rotation,
        "picture": list(result.picture),
        "origin_s": result.origin_s,
        "clean_clock": result.clean_clock,
        "source_frames": result.decoded_frames,
    }
    return [shared | clip | {"key": clip_key(source_id, clip["start_s"], clip["end_s"])} for clip in result.clips]


def split_identity(config: SplitConfig) -> dict[str, Any]:
    """The settings that decide what comes out; weights count by the SHA-256 of their content, not by their place.

    Raises:
        OSError: the weights cannot be read.
    """
    identity = asdict(config)
    weights = identity.pop("weights")
    return identity | ({"weights": storage.sha256_file(weights)} if weights else {})


def split_stage(config: SplitConfig, decode: DecodeConfig, resources: StageResources) -> Stage:
    """The stage that probes, splits and scores.

    Raises:
        OSError: the weights of its detector cannot be read.
    """
    added = sorted(score.name for score in scores_of("split") if score.measure is not None)
    return Stage(
        name="split",
        settings={"version": 6, **split_identity(config), **({"measures": added} if added else {})},
        schema=CLIPS,
        function=partial(SplitFunction, config=config, decode=decode),
        rows_per_part=32,
        resources=resources,
    )


class SplitSources(Step):
    """Cuts the sources into measured clips."""

    def __init__(self, config: CurateConfig) -> None:
        self.stages = (split_stage(config.split, config.decode, config.resources.of("split")),)

    def apply(self, run: Run) -> None:
        """Split what is new.

        Raises:
            JobError: as soon as more sources have failed than the run bears.
        """
        first = run.first
        work = pc.max_element_wise(first["size"], 0).cast(pa.float64())
        inputs = pa.table({"work_key": first["source_id"], "uri": first["uri"], WORK: work})
        unreadable = pc.drop_null(run.sources["error"])
        share, total = run.config.resources.max_failed_share, run.sources.num_rows
        if len(unreadable) > share * total:
            raise run.too_many(TooManyFailuresError(unreadable[0].as_py(), len(unreadable)), total, "sources")
        table = run.compute("split", inputs, max_failed=share * total - len(unreadable))
        # Fingerprints are most of the table, and read where they are needed.
        columns = [*(name for name in CLIPS.names if name != "fingerprint"), PART]
        parts = table.parts()
        rows = table.read(columns, keys=first["source_id"])
        run.failed = rows.filter(pc.is_null(rows["key"]))
        clips = sort(rows.filter(pc.is_valid(rows["key"])), ["work_key", "start_s"])
        places = pc.index_in(clips["work_key"], first["source_id"].combine_chunks())
        run.clips = Clips(clips, first["uri"].take(places), parts)
