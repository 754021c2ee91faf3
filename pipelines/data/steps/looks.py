"""The looks stage: a few frames of each kept clip, decoded once, as small JPEG files for all that look at clips.

Most looks are made by the split stage's workers while they have the source's file, so that it need not be fetched
again (``SourceLooks``): those of the clips that the thresholds keep. The stage itself makes what is missing then, as
after a change of thresholds.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipelines.data.config import CurateConfig
from pipelines.data.keys import picture_key, picture_keys
from pipelines.data.scores import Thresholds
from pipelines.data.settings import DecodeConfig, LooksConfig
from pipelines.data.stage.stage import Row, Stage, StageResources
from pipelines.data.stage.table import StageTable, commit_part
from pipelines.data.steps.decide import decide
from pipelines.data.steps.run import Run, Step
from pipelines.data.video.decode import DecodeJob
from pipelines.data.video.frames import ClipReader, Wanted, clip_inputs, clip_job, evenly
from pipelines.data.video.looks import LOOKS, encode_jpeg, looks_settings
from pipelines.data.video.reader import VideoError


class LooksFunction:
    """Decodes clips in a child process and keeps a few of their frames."""

    def __init__(self, uri: str, *, config: LooksConfig, decode: DecodeConfig) -> None:
        self.config = config
        self.reader = ClipReader(uri, decode)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Looks of each clip, or why there are none."""
        results = self.reader.read(rows, partial(_wanted, config=self.config))
        return [_row(row["work_key"], row["key"], frames, self.config.quality) for row, frames in results]


class SourceLooks:
    """Looks of the clips that thresholds keep, for the split stage to have made while it has their files.

    They are committed to the table of the looks stage, part by part; the last one by ``commit``.
    """

    def __init__(self, stage: Stage, uri: str, config: LooksConfig, thresholds: Thresholds) -> None:
        self.stage = stage
        self.uri = uri
        self.config = config
        self.thresholds = thresholds
        self._rows: list[Row] = []

    def choose(self, clips: Sequence[Row]) -> list[Row]:
        """Those clips of a source (rows of the split stage) that want looks."""
        return [clip for clip in clips if clip.get("key") and decide(clip["scores"], self.thresholds)[0] == "kept"]

    def job(self, clip: Row, path: str) -> DecodeJob:
        """What decodes the looks of a clip from its local file."""
        return clip_job(picture_key(clip["key"], clip["picture"]), path, _wanted(clip, self.config), clip)

    def add(self, clip: Row, frames: NDArray[np.uint8] | VideoError) -> None:
        """Take what was decoded of a clip.

        Raises:
            OSError: the table cannot be written to.
        """
        self._rows.append(_row(picture_key(clip["key"], clip["picture"]), clip["key"], frames, self.config.quality))
        if len(self._rows) == self.stage.rows_per_part:
            self.commit()

    def commit(self) -> None:
        """Commit what has been added.

        Raises:
            OSError: the table cannot be written to.
        """
        rows, self._rows = self._rows, []
        if rows:
            commit_part(self.stage, self.uri, rows)


def _wanted(clip: Row, config: LooksConfig) -> Wanted:
    """Which frames of a clip, and how large: no larger than its picture, in square pixels."""
    _, _, width, height = clip["picture"]
    side = min(config.shorter_side, max(1, int(min(width * clip["pixel_aspect"], height))))
    return evenly(clip, config.num_frames, side)


def _row(work_key: str, key: str, frames: NDArray[np.uint8] | VideoError, quality: int) -> Row:
    row: Row = {"work_key": work_key, "key": key}
    if isinstance(frames, VideoError):
        return row | {"error": frames.reason}
    return row | {"images": [encode_jpeg(frame, quality) for frame in frames]}


def looks_stage(config: LooksConfig, decode: DecodeConfig, resources: StageResources) -> Stage:
    """The stage that makes looks."""
    return Stage(
        name="looks",
        settings=looks_settings(config),
        schema=LOOKS,
        function=partial(LooksFunction, config=config, decode=decode),
        rows_per_part=64,
        file_column="uri",
        row_group_rows=8,
        resources=resources,
    )


class Look(Step):
    """Looks of the clips kept so far; of most, the split stage's workers have made them."""

    def __init__(self, config: CurateConfig) -> None:
        self.config = config
        self.stages = (looks_stage(config.looks, config.decode, config.resources.of("looks")),)

    def while_split(self) -> SourceLooks:
        """Begins to make looks of the clips of a batch of sources, while their files are at hand."""
        [stage] = self.stages
        return SourceLooks(stage, StageTable(self.config.dataset, stage).uri, self.config.looks, self.config.thresholds)

    def apply(self, run: Run) -> None:
        """Make those that are missing, and note where they are."""
        kept = run.clips.verdicts.kept
        rows = run.clips.of(kept)
        run.clips.add_looks(run.compute_clips("looks", clip_inputs(rows, picture_keys(rows))), kept)
