"""Frames of clips for the stages that look at them: decoded in a child process, in the order of the clips."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pipelines.data.video.local_files import LocalFiles
from pipelines.data.video.reader import ClipRequest, VideoError

# What a stage over clips is given of each; the rest of it comes from the split stage's row.
REQUEST_COLUMNS = (
    "start_s",
    "end_s",
    "rotation",
    "picture",
    "pixel_aspect",
    "source_frames",
    "origin_s",
    "clean_clock",
)
CLIP_INPUTS = pa.schema(
    [
        ("work_key", pa.string()),
        ("key", pa.string()),
        ("uri", pa.string()),
        (WORK, pa.float64()),  # seconds of video
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("rotation", pa.int16()),
        ("picture", pa.list_(pa.int32())),
        ("pixel_aspect", pa.float64()),
        ("source_frames", pa.int64()),
        ("origin_s", pa.float64()),
        ("clean_clock", pa.bool_()),
        # Fingerprints are most of the split stage's table, so a worker reads those of its clips where they are.
        ("split_part", pa.dictionary(pa.int32(), pa.string())),  # URI
    ]
)


def clip_inputs(clips: pa.Table, work_keys: pa.ChunkedArray) -> pa.Table:
    """The inputs of a stage over clips, as ``CLIP_INPUTS``.

    Args:
        clips: Rows of the split stage, with ``uri`` and ``split_part``.
        work_keys: That name the work.
    """
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


def evenly(row: Row, num_frames: int, shorter_side: int) -> Wanted:
    """So many frames, evenly spaced, in the clip's own aspect ratio."""
    seconds = max(row["end_s"] - row["start_s"], 1e-3)
    _, _, width, height = row["picture"]
    aspect = width * row["pixel_aspect"] / height
    size = (round(shorter_side * max(aspect, 1)), round(shorter_side * max(1 / aspect, 1)))
    return Wanted(num_frames / seconds, num_frames, *size)


def read_fingerprints(rows: Sequence[Row]) -> dict[str, bytes]:
    """By clip, its fingerprint, from the file of the split stage's table that its row names; empty if it names none."""
    wanted = pa.array([row["key"] for row in rows], pa.string())
    found: dict[str, bytes] = {row["key"]: b"" for row in rows}
    for part in dict.fromkeys(row["split_part"] for row in rows if row["split_part"] is not None):
        table = read_columns(part, ["key", "fingerprint"])
        chosen = table.filter(pc.is_in(table["key"], wanted))
        found |= zip(chosen["key"].to_pylist(), chosen["fingerprint"].to_pylist(), strict=True)
    return found


def clip_job(work_key: str, path: str, wanted: Wanted, clip: Row) -> DecodeJob:
    """What decodes frames of a clip from a local file.

    Args:
        work_key: Names the work in the record of crashes.
        path: The file.
        wanted: Which frames.
        clip: Its ``REQUEST_COLUMNS`` and ``fingerprint``.
    """
    known: dict[str, Any] = {name: clip[name] for name in (*REQUEST_COLUMNS, "fingerprint")}
    request = ClipRequest(path=path, **vars(wanted), **known)
    return DecodeJob(work_key, "clip", {"request": request}, after_crash={"use_decord": False})


class ClipReader:
    """Decodes clips, one ahead of what its caller is busy with."""

    def __init__(self, uri: str, decode: DecodeConfig) -> None:
        self._child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)))

    def read(
        self, rows: Sequence[Row], wanted: Callable[[Row], Wanted]
    ) -> Iterator[tuple[Row, NDArray[np.uint8] | VideoError]]:
        """Each row with its frames [T, H, W, 3], or why there are none."""
        files = LocalFiles()
        fingerprints = read_fingerprints(rows)
        last_use = {row["uri"]: index for index, row in enumerate(rows)}
        jobs = self._jobs(rows, wanted, files, fingerprints)
        for index, (row, result) in enumerate(zip(rows, self._child.run(jobs), strict=True)):
            if last_use[row["uri"]] == index:
                files.release(row["uri"])
            yield row, result

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def _jobs(
        self,
        rows: Sequence[Row],
        wanted: Callable[[Row], Wanted],
        files: LocalFiles,
        fingerprints: Mapping[str, bytes],
    ) -> Iterator[DecodeJob | VideoError]:
        for row in rows:
            try:
                path = files.path(row["uri"])
            except VideoError as error:
                yield error
                continue
            yield clip_job(row["work_key"], path, wanted(row), row | {"fingerprint": fingerprints[row["key"]]})
