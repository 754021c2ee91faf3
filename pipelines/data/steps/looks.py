"""The looks stage: a few frames of each kept clip, decoded once, as small JPEG files for all that look at clips.

Most looks are made by the split stage's workers while they have the source's file, so that it need not be fetched
again (``split.EarlyLooks``). The stage itself makes what is missing then, as after a change of thresholds.
"""

from collections.abc import Sequence
from functools import partial

from pipelines.data.config import CurateConfig
from pipelines.data.keys import picture_keys
from pipelines.data.settings import DecodeConfig, LooksConfig
from pipelines.data.stage.stage import Row, Stage, StageResources
from pipelines.data.steps.run import Run, Step
from pipelines.data.video.frames import ClipReader, clip_inputs
from pipelines.data.video.looks import LOOKS, look_row, looks_settings, wanted_looks


class LooksFunction:
    """Decodes clips in a child process and keeps a few of their frames."""

    def __init__(self, uri: str, *, config: LooksConfig, decode: DecodeConfig) -> None:
        self.config = config
        self.reader = ClipReader(uri, decode)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Looks of each clip, or why there are none."""
        results = self.reader.read(rows, partial(wanted_looks, config=self.config))
        return [look_row(row, frames, self.config.quality) for row, frames in results]


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
        self.stages = (looks_stage(config.looks, config.decode, config.resources.of("looks")),)

    def apply(self, run: Run) -> None:
        """Make those that are missing, and note where they are."""
        kept = run.clips.verdicts.kept
        rows = run.clips.of(kept)
        run.clips.add_looks(run.compute("looks", clip_inputs(rows, picture_keys(rows))), kept)
