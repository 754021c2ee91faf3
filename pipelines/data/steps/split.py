"""The split stage: from a source to its measured clips, the one fan-out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.data.settings import DecodeConfig, SplitConfig, StageResources
from pipelines.data.snapshot.schemas import PASS_SCORES
from pipelines.data.stage.run import Row, Stage
from pipelines.data.video.decode import CRASHES, CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.reader import DecodedSource, VideoError, unreadable_error

# ``key`` is null in the one row of a source that yields no clip; ``error`` says why then.
CLIPS = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),  # the source's content hash
        pa.field("key", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("scores", pa.struct([pa.field(name, pa.float64()) for name in PASS_SCORES])),
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


class LocalFiles:
    """Local paths of the files of a batch, the fetched ones removed at the end."""

    def __init__(self) -> None:
        self._open: dict[str, ExitStack] = {}
        self._paths: dict[str, str] = {}

    def path(self, uri: str) -> str:
        """Where a file's content is on this machine.

        Raises:
            VideoError: if it cannot be fetched.
        """
        if uri not in self._paths:
            stack = ExitStack()
            try:
                self._paths[uri] = stack.enter_context(storage.local_copy(uri))
            except OSError as error:  # it could be read when it was hashed
                raise unreadable_error(error).as_transient() from error
            self._open[uri] = stack
        return self._paths[uri]

    def release(self, uri: str) -> None:
        """Forget a file, and its copy."""
        self._paths.pop(uri, None)
        if stack := self._open.pop(uri, None):
            stack.close()


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


def clip_key(source_id: str, start_s: float, end_s: float) -> str:
    """Names a clip by what it shows: content hash of the source, and span in milliseconds."""
    return f"{source_id}:{round(start_s * 1000):08d}-{round(end_s * 1000):08d}"


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
    return Stage(
        name="split",
        settings={"version": 6, **split_identity(config)},
        schema=CLIPS,
        function=partial(SplitFunction, config=config, decode=decode),
        rows_per_part=32,
        resources=resources,
    )
