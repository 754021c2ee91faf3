"""The split stage: from a source to its measured clips, the one fan-out."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.data.config import CurateConfig
from pipelines.data.keys import clip_key, picture_key, sources_of
from pipelines.data.reasons import reason_of
from pipelines.data.scores import Thresholds, scores_of
from pipelines.data.settings import DecodeConfig, LooksConfig, SplitConfig
from pipelines.data.stage.columns import positions, sort, take
from pipelines.data.stage.stage import WORK, Row, Stage, StageResources
from pipelines.data.stage.table import PART, StageTable, anti_join, commit_part
from pipelines.data.steps.clips import Clips
from pipelines.data.steps.decide import decide
from pipelines.data.steps.run import Run, Step
from pipelines.data.video.decode import CRASHES, CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.frames import LocalFiles, clip_job
from pipelines.data.video.looks import look_row, wanted_looks
from pipelines.data.video.reader import DecodedSource
from pipelines.decoding.errors import VideoError
from pipelines.storage.cache import local_path

# ``key`` is null in the one row of a source that yields no clip; ``error`` says why then.
CLIPS = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),  # the source's content hash
        pa.field("key", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("scores", pa.struct([pa.field(score.name, pa.float64()) for score in scores_of("split")])),
        pa.field("fingerprint", pa.binary()),  # thumbnails, see video/fingerprint.py
        pa.field("movement", pa.binary()),  # what moves, see video/movement.py
        pa.field("codec", pa.string()),
        pa.field("pixel_format", pa.string()),
        pa.field("pixel_aspect", pa.float64()),
        pa.field("rotation", pa.int16()),
        pa.field("picture", pa.list_(pa.int32())),  # left, top, width, height between bars, px of the upright frame
        pa.field("origin_s", pa.float64()),
        pa.field("clean_clock", pa.bool_()),
        pa.field("source_frames", pa.int64()),
        pa.field("error", pa.string()),
    ]
)

LOOKED = "looked"  # column of the stage's inputs: work keys of the looks that there are of a source, if any


@dataclass(frozen=True)
class EarlyLooks:
    """Has looks made of the clips that thresholds keep while their file is at hand, in place of the looks stage."""

    stage: Stage  # the looks stage
    uri: str  # of its table
    config: LooksConfig
    thresholds: Thresholds

    def choose(self, source: Row, clips: Sequence[Row]) -> list[Row]:
        """Those clips of a source that want looks and have none, by the work keys that the looks stage gives them."""
        return [
            clip | {"work_key": key}
            for clip in clips
            if clip.get("key") and decide(clip["scores"], self.thresholds)[0] == "kept"
            if (key := picture_key(clip["key"], clip["picture"])) not in (source.get(LOOKED) or ())
        ]


class SplitFunction:
    """Decodes sources in a child process and turns each into rows of its clips; looks are committed before these."""

    def __init__(self, uri: str, *, config: SplitConfig, decode: DecodeConfig, looks: EarlyLooks | None = None) -> None:
        self.config = replace(config, weights=local_path(config.weights)) if config.weights else config
        self.looks = looks
        self.child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)), weights=self.config.weights)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Clips of each source."""
        batch = _Batch(self.config, self.looks)
        for result in self.child.run(batch.jobs(rows)):
            batch.take(result)
        batch.commit_looks()
        return batch.clips


class _Batch:
    """Sources that are being split. Looks of the clips of one are asked for as soon as they are known."""

    def __init__(self, config: SplitConfig, looks: EarlyLooks | None) -> None:
        self.config = config
        self.looks = looks
        self.clips: list[Row] = []
        self._look_rows: list[Row] = []  # not committed yet
        self._files = LocalFiles()
        self._waiting: deque[tuple[Row, Row]] = deque()  # source and clip, for looks
        self._asked: deque[tuple[Row, Row | None]] = deque()  # what the jobs under way are about, likewise
        self._left: Counter[str] = Counter()  # looks to be made of a file

    def jobs(self, rows: Sequence[Row]) -> Iterator[DecodeJob | VideoError | None]:
        """To split each source and look at its clips; while the last source is split, there may be nothing to do."""
        for row in rows:
            self._asked.append((row, None))
            try:
                path = self._files.path(row["uri"])
            except VideoError as error:
                yield error
            else:
                yield DecodeJob(row["work_key"], "split", {"path": path, "config": self.config})
            yield from self._look_jobs()
        while True:
            yield None
            yield from self._look_jobs()

    def _look_jobs(self) -> Iterator[DecodeJob]:
        while self._waiting and self.looks is not None:
            source, clip = self._waiting.popleft()
            self._asked.append((source, clip))
            yield clip_job(clip, self._files.path(source["uri"]), wanted_looks(clip, self.looks.config))

    def take(self, result: Any) -> None:
        """The result of the job that has been under way for longest."""
        source, clip = self._asked.popleft()
        uri = source["uri"]
        if clip is None:
            clips = clip_rows(source["work_key"], result)
            self.clips += clips
            chosen = self.looks.choose(source, clips) if self.looks is not None else []
            self._waiting += [(source, clip) for clip in chosen]
            self._left[uri] = len(chosen)
        elif self.looks is not None:
            self._look_rows.append(look_row(clip, result, self.looks.config.quality))
            self._left[uri] -= 1
            if len(self._look_rows) == self.looks.stage.rows_per_part:
                self.commit_looks()
        if not self._left[uri]:
            self._files.release(uri)

    def commit_looks(self) -> None:
        """Commit those that have been made since the last time."""
        if self.looks is not None and self._look_rows:
            commit_part(self.looks.stage, self.looks.uri, self._look_rows)
            self._look_rows = []


def clip_rows(source_id: str, result: DecodedSource | VideoError) -> list[Row]:
    """The rows that a source leaves in the table."""
    if isinstance(result, VideoError):
        return [{"work_key": source_id, "error": reason_of(result)}]
    shared = {name: value for name, value in vars(result).items() if name != "clips"} | {"work_key": source_id}
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
    config: SplitConfig, decode: DecodeConfig, resources: StageResources, *, looks: EarlyLooks | None = None
) -> Stage:
    """The stage that probes, splits and scores; looks that are made besides change nothing of what it makes.

    Raises:
        OSError: the weights of its detector cannot be read.
    """
    added = sorted(score.name for score in scores_of("split") if score.measure is not None)
    return Stage(
        name="split",
        settings={"version": 9, **split_identity(config), **({"measures": added} if added else {})},
        schema=CLIPS,
        function=partial(SplitFunction, config=config, decode=decode, looks=looks),
        rows_per_part=32,
        resources=resources,
    )


class SplitSources(Step):
    """Cuts the sources into measured clips; if there is a looks stage, has looks of them made meanwhile."""

    def __init__(self, config: CurateConfig, looks: Stage | None = None) -> None:
        self.looks = looks
        early = None
        if looks is not None:
            early = EarlyLooks(looks, StageTable(config.dataset, looks).uri, config.looks, config.bounds)
        self.stages = (split_stage(config.split, config.decode, config.resources.of("split"), looks=early),)

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
            raise run.too_many(unreadable[0].as_py(), len(unreadable), total, "sources")
        if self.looks is not None and anti_join(inputs, run.table("split").keys()).num_rows:
            inputs = inputs.append_column(LOOKED, _looked(first["source_id"], run.table(self.looks.name).keys()))
        table = run.compute("split", inputs, total=total, failed=len(unreadable))
        # These are most of the table, and read where they are needed.
        columns = [*(name for name in CLIPS.names if name not in ("fingerprint", "movement")), PART]
        parts = table.parts()
        rows = table.read(columns, keys=first["source_id"], parts=parts)
        run.failed = rows.filter(pc.is_null(rows["key"]))
        if run.failed.num_rows:  # else nothing is copied
            rows = rows.filter(pc.is_valid(rows["key"]))
        clips = sort(rows, ["work_key", "start_s"])
        del rows  # which weigh as much
        places = positions(clips["work_key"], first["source_id"]).to_numpy()
        run.clips = Clips(clips, take(first["uri"], places), parts)


def _looked(sources: pa.ChunkedArray, looks: pa.Array) -> pa.ChunkedArray:
    """Of each source, the keys of the looks that there are of its clips, as after a change of split settings."""
    keys = pa.chunked_array([looks], looks.type)
    found = pa.table({"source": sources_of(keys), "key": keys}).group_by("source").aggregate([("key", "list")])
    return found["key_list"].take(positions(sources, found["source"]))
