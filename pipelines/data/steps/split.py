"""The split stage: from a source to its measured clips, the one fan-out."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

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


class ClipWork(Protocol):
    """Work on the clips of a source that is done while its file is at hand; what comes of it is committed elsewhere."""

    def choose(self, clips: Sequence[Row]) -> list[Row]:
        """Those of a source's clips that it is about."""

    def job(self, clip: Row, path: str) -> DecodeJob:
        """What the decode child is to do for a clip of a local file."""

    def add(self, clip: Row, result: Any) -> None:
        """Take the result of a clip's job."""

    def commit(self) -> None:
        """Commit what has not been committed yet."""


class SplitFunction:
    """Decodes sources in a child process and turns each into the rows of its clips.

    Args:
        uri: Of the folder beside whose parts crashes are recorded.
        config: How to cut.
        decode: Bounds of the child.
        clip_work: Begins further work on the clips of a batch; None: there is none.
    """

    def __init__(
        self, uri: str, *, config: SplitConfig, decode: DecodeConfig, clip_work: Callable[[], ClipWork] | None = None
    ) -> None:
        self.config = config
        self.clip_work = clip_work
        self.child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)), weights=config.weights)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Clips of each source; when they are returned, what the further work made is committed."""
        batch = _Batch(self.config, self.clip_work() if self.clip_work is not None else None)
        for result in self.child.run(batch.jobs(rows)):
            batch.take(result)
        if batch.work is not None:
            batch.work.commit()
        return batch.clips


class _Batch:
    """Sources that are being split. Further work on the clips of one is asked for as soon as they are known."""

    def __init__(self, config: SplitConfig, work: ClipWork | None) -> None:
        self.config = config
        self.work = work
        self.clips: list[Row] = []
        self._files = LocalFiles()
        self._waiting: deque[tuple[Row, Row]] = deque()  # source and clip, for further work
        self._asked: deque[tuple[Row, Row | None]] = deque()  # what the jobs under way are about, likewise
        self._left: Counter[str] = Counter()  # further work on the clips of a file

    def jobs(self, rows: Sequence[Row]) -> Iterator[DecodeJob | VideoError | None]:
        """To split each source and work on its clips; while the last source is split, there may be nothing to do."""
        for row in rows:
            self._asked.append((row, None))
            try:
                path = self._files.path(row["uri"])
            except VideoError as error:
                yield error
            else:
                yield DecodeJob(row["work_key"], "split", {"path": path, "config": self.config})
            yield from self._further()
        while True:
            yield None
            yield from self._further()

    def _further(self) -> Iterator[DecodeJob]:
        while self._waiting and self.work is not None:
            source, clip = self._waiting.popleft()
            self._asked.append((source, clip))
            yield self.work.job(clip, self._files.path(source["uri"]))

    def take(self, result: Any) -> None:
        """The result of the job that has been under way for longest."""
        source, clip = self._asked.popleft()
        uri = source["uri"]
        if clip is None:
            clips = clip_rows(source["work_key"], result)
            self.clips += clips
            chosen = self.work.choose(clips) if self.work is not None else []
            self._waiting += [(source, clip) for clip in chosen]
            self._left[uri] = len(chosen)
        elif self.work is not None:
            self.work.add(clip, result)
            self._left[uri] -= 1
        if not self._left[uri]:
            self._files.release(uri)


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


def split_stage(
    config: SplitConfig,
    decode: DecodeConfig,
    resources: StageResources,
    *,
    clip_work: Callable[[], ClipWork] | None = None,
) -> Stage:
    """The stage that probes, splits and scores.

    Args:
        config: How to cut.
        decode: Bounds of its decode children.
        resources: Of its processes.
        clip_work: Begins further work on the clips of a batch, while the files are at hand. It changes nothing of
            what the stage makes of them.

    Raises:
        OSError: the weights of its detector cannot be read.
    """
    added = sorted(score.name for score in scores_of("split") if score.measure is not None)
    return Stage(
        name="split",
        settings={"version": 6, **split_identity(config), **({"measures": added} if added else {})},
        schema=CLIPS,
        function=partial(SplitFunction, config=config, decode=decode, clip_work=clip_work),
        rows_per_part=32,
        resources=resources,
    )


class SplitSources(Step):
    """Cuts the sources into measured clips."""

    def __init__(self, config: CurateConfig, clip_work: Callable[[], ClipWork] | None = None) -> None:
        resources = config.resources.of("split")
        self.stages = (split_stage(config.split, config.decode, resources, clip_work=clip_work),)

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
