"""Looks: a few frames of each clip as small JPEG files, made once for all that look at clips."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.keys import picture_keys
from pipelines.data.reasons import reason_of
from pipelines.data.settings import LooksConfig
from pipelines.data.stage.stage import WORK_KEY, Row
from pipelines.data.video.frames import CLIP_INPUTS, Wanted, clip_inputs
from pipelines.decoding.errors import VideoError
from pipelines.errors import JobError
from pipelines.parquet import read_parquet_rows

LOOKS = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary())),  # JPEG files in the order of time; frame i is at i / n of the clip
        pa.field("error", pa.string()),
    ]
)
# What a stage that looks at clips is given of each: images are large, so its worker reads them where they are.
LOOK_INPUTS = pa.schema([*CLIP_INPUTS, ("looks_part", pa.dictionary(pa.int32(), pa.string()))])


@dataclass(frozen=True)
class Looks:
    """The looks of a clip."""

    images: Sequence[bytes]  # JPEG files, evenly spaced; none where there is an error
    error: str | None  # why there are none, as the ledger tells it

    def evenly(self, count: int) -> list[bytes]:
        """So many of them, evenly spaced from the first on."""
        return [self.images[index * len(self.images) // count] for index in range(count)]

    @property
    def middle(self) -> bytes:
        """The one of the clip's middle."""
        return self.images[len(self.images) // 2]


def looks_settings(config: LooksConfig) -> dict[str, Any]:
    """What looks depend on besides their clip; part of the settings of every stage that reads them."""
    settings = asdict(config)
    del settings["always"]  # says whether, not how
    return {"version": 1, **settings}


def wanted_looks(clip: Row, config: LooksConfig) -> Wanted:
    """Which frames of a clip, and how large: no larger than its picture, in square pixels and its aspect ratio."""
    _, _, width, height = clip["picture"]
    aspect = width * clip["pixel_aspect"] / height
    side = min(config.shorter_side, max(1, int(min(width * clip["pixel_aspect"], height))))
    size = (round(side * max(aspect, 1)), round(side * max(1 / aspect, 1)))
    seconds = max(clip["end_s"] - clip["start_s"], 1e-3)
    return Wanted(config.num_frames / seconds, config.num_frames, *size)


def look_row(clip: Row, frames: NDArray[np.uint8] | VideoError, quality: int) -> Row:
    """The row of ``LOOKS`` that comes of what was decoded of a clip."""
    row: Row = {"work_key": clip["work_key"], "key": clip["key"]}
    if isinstance(frames, VideoError):
        return row | {"error": reason_of(frames)}
    return row | {"images": [encode_jpeg(frame, quality) for frame in frames]}


def look_inputs(clips: pa.Table) -> pa.Table:
    """``LOOK_INPUTS`` of a stage that looks at clips (rows of the split stage, with ``uri`` and both parts)."""
    inputs = clip_inputs(clips, picture_keys(clips))
    return inputs.append_column(LOOK_INPUTS.field("looks_part"), clips["looks_part"])


def read_looks(rows: Sequence[Row]) -> Iterator[tuple[Row, Looks]]:
    """Each row (of ``LOOK_INPUTS``) with its looks, file by file of their table; memory holds a few.

    Raises:
        JobError: a file lacks a row that it had when the stage began.
    """
    for part in dict.fromkeys(row["looks_part"] for row in rows):
        waiting = {row["work_key"]: row for row in rows if row["looks_part"] == part}
        for found in read_rows(part, WORK_KEY, list(waiting)):
            yield waiting.pop(found["work_key"]), Looks(found["images"] or (), found["error"])
        if waiting:
            raise JobError(
                f"{part} lacks the looks of {len(waiting)} clips, such as {next(iter(waiting))}: files of the table "
                "were changed meanwhile; give the same command again"
            )


def read_rows(part: str, column: str, names: Sequence[str]) -> Iterator[Row]:
    """The rows of a file of looks whose column has one of some values; little more than they is fetched."""
    with storage.open_ranges(part) as file:
        for table in read_parquet_rows(file, column, names):
            yield from table.to_pylist()


def encode_jpeg(frame: NDArray[np.uint8], quality: int) -> bytes:
    """An RGB frame as a JPEG file; quality 0..100."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """The RGB frame [height, width, 3] of a JPEG file.

    Raises:
        ValueError: it is none.
    """
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{len(data)} bytes are no JPEG file")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
