"""Frames of clips for the stages that look at them: decoded in a child process, in the order of the clips."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.settings import DecodeConfig
from pipelines.data.stage.stage import WORK, Row
from pipelines.data.stage.table import read_columns
from pipelines.data.video.decode import CRASHES, CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.reader import ClipRequest
from pipelines.decoding.errors import VideoError, unreadable_error

# What is known of a clip from the split stage's row, for it to be decoded again; with its fingerprint.
_REQUEST = pa.schema(
    [
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("rotation", pa.int16()),
        ("picture", pa.list_(pa.int32())),
        ("pixel_aspect", pa.float64()),
        ("source_frames", pa.int64()),
        ("origin_s", pa.float64()),
        ("clean_clock", pa.bool_()),
    ]
)
REQUEST_COLUMNS = tuple(_REQUEST.names)
# What a stage over clips is given of each.
CLIP_INPUTS = pa.schema(
    [
        ("work_key", pa.string()),
        ("key", pa.string()),
        ("uri", pa.string()),
        (WORK, pa.float64()),  # seconds of video
        *_REQUEST,
        # Fingerprints are most of the split stage's table, so a worker reads those of its clips where they are.
        ("split_part", pa.dictionary(pa.int32(), pa.string())),  # URI
    ]
)


def clip_inputs(clips: pa.Table, work_keys: pa.ChunkedArray) -> pa.Table:
    """``CLIP_INPUTS`` of a stage over clips (rows of the split stage, with ``uri`` and ``split_part``)."""
    work = pc.subtract(clips["end_s"], clips["start_s"])
    columns = [clips[name] for name in CLIP_INPUTS.names[4:]]
    return pa.table([work_keys, clips["key"], clips["uri"], work, *columns], schema=CLIP_INPUTS)


@dataclass(frozen=True)
class Wanted:
    """Which frames of a clip, and how large."""

    fps: float
    num_frames: int
    width: int  # px
    height: int


def read_fingerprints(rows: Sequence[Row]) -> dict[str, bytes]:
    """By clip, its fingerprint, from the file of the split stage's table that its row names; empty if it names none."""
    wanted = pa.array([row["key"] for row in rows], pa.string())
    found: dict[str, bytes] = {row["key"]: b"" for row in rows}
    for part in dict.fromkeys(row["split_part"] for row in rows if row["split_part"] is not None):
        table = read_columns(part, ["key", "fingerprint"])
        chosen = table.filter(pc.is_in(table["key"], wanted))
        found |= zip(chosen["key"].to_pylist(), chosen["fingerprint"].to_pylist(), strict=True)
    return found


def clip_job(clip: Row, path: str, wanted: Wanted) -> DecodeJob:
    """What decodes frames of a clip (``REQUEST_COLUMNS``, ``fingerprint`` and a work key) from a local file."""
    known: dict[str, Any] = {name: clip[name] for name in (*REQUEST_COLUMNS, "fingerprint")}
    request = ClipRequest(path=path, **vars(wanted), **known)
    return DecodeJob(clip["work_key"], "clip", {"request": request}, after_crash={"use_decord": False})


class LocalFiles:
    """Local paths of the files of a batch, the fetched ones removed at the end."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, ExitStack]] = {}  # by URI

    def path(self, uri: str) -> str:
        """Where a file's content is on this machine.

        Raises:
            VideoError: if it cannot be fetched.
        """
        if uri not in self._open:
            stack = ExitStack()
            try:
                self._open[uri] = (stack.enter_context(storage.local_copy(uri)), stack)
            except OSError as error:  # it could be read when it was hashed
                raise unreadable_error(error, transient=True) from error
        return self._open[uri][0]

    def release(self, uri: str) -> None:
        """Forget a file, and its copy."""
        if uri in self._open:
            self._open.pop(uri)[1].close()


class ClipReader:
    """Decodes clips, one ahead of what its caller is busy with."""

    def __init__(self, uri: str, decode: DecodeConfig) -> None:
        self.child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)))

    def read(
        self, rows: Sequence[Row], wanted: Callable[[Row], Wanted]
    ) -> Iterator[tuple[Row, NDArray[np.uint8] | VideoError]]:
        """Each row with its frames [T, H, W, 3], or why there are none."""
        files = LocalFiles()
        last_use = {row["uri"]: index for index, row in enumerate(rows)}
        results = self.child.run(_jobs(rows, wanted, files, read_fingerprints(rows)))
        for index, (row, result) in enumerate(zip(rows, results, strict=True)):
            if last_use[row["uri"]] == index:
                files.release(row["uri"])
            yield row, result


def _jobs(
    rows: Sequence[Row], wanted: Callable[[Row], Wanted], files: LocalFiles, fingerprints: Mapping[str, bytes]
) -> Iterator[DecodeJob | VideoError]:
    for row in rows:
        try:
            path = files.path(row["uri"])
        except VideoError as error:
            yield error
        else:
            yield clip_job(row | {"fingerprint": fingerprints[row["key"]]}, path, wanted(row))
