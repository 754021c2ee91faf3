"""Frames of clips for the stages that look at them: decoded in a child process, in the order of the clips."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.decode import CRASHES, CrashLog, DecodeChild, DecodeJob
from pipelines.data.runner import WORK, Row
from pipelines.data.settings import DecodeConfig
from pipelines.data.split import LocalFiles
from pipelines.data.video import ClipRequest, VideoError

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
    ]
)


def clip_inputs(clips: pa.Table, uris: pa.ChunkedArray, work_keys: pa.ChunkedArray) -> pa.Table:
    """The inputs of a stage over clips, as ``CLIP_INPUTS``.

    Args:
        clips: Rows of the split stage.
        uris: Of their files.
        work_keys: That name the work.
    """
    work = pc.subtract(clips["end_s"], clips["start_s"])
    request = [clips[name] for name in REQUEST_COLUMNS]
    return pa.table([work_keys, clips["key"], uris, work, *request], schema=CLIP_INPUTS)


def picture_keys(clips: pa.Table) -> pa.ChunkedArray:
    """Names clips (rows of the split stage) together with the part of their frame that counts."""
    return pc.binary_join_element_wise(clips["key"], picture_names(clips), "+")


def picture_names(clips: pa.Table) -> pa.ChunkedArray:
    """The part of its frame that counts of each clip: "left,top,width,height"."""
    return pc.binary_join(clips["picture"].cast(pa.list_(pa.string())), ",")


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


class ClipReader:
    """Decodes clips, one ahead of what its caller is busy with."""

    def __init__(self, uri: str, decode: DecodeConfig) -> None:
        self._child = DecodeChild(decode, CrashLog(storage.join(uri, CRASHES)))

    def read(
        self, rows: Sequence[Row], wanted: Callable[[Row], Wanted]
    ) -> Iterator[tuple[Row, NDArray[np.uint8] | VideoError]]:
        """Each row with its frames [T, H, W, 3], or why there are none."""
        files = LocalFiles()
        last_use = {row["uri"]: index for index, row in enumerate(rows)}
        jobs = self._jobs(rows, wanted, files)
        for index, (row, result) in enumerate(zip(rows, self._child.run(jobs), strict=True)):
            if last_use[row["uri"]] == index:
                files.release(row["uri"])
            yield row, result

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def _jobs(
        self, rows: Sequence[Row], wanted: Callable[[Row], Wanted], files: LocalFiles
    ) -> Iterator[DecodeJob | VideoError]:
        for row in rows:
            try:
                path = files.path(row["uri"])
            except VideoError as error:
                yield error
                continue
            what: dict[str, Any] = vars(wanted(row))
            request = ClipRequest(path=path, **what, **{name: row[name] for name in REQUEST_COLUMNS})
            yield DecodeJob(row["work_key"], "clip", {"request": request}, after_crash={"use_decord": False})
