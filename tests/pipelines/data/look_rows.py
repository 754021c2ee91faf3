"""Clips of one file as the stages that look at clips are given them."""

from pathlib import Path

import pyarrow as pa

from pipelines.data.keys import picture_keys
from pipelines.data.settings import DecodeConfig, LooksConfig, SplitConfig
from pipelines.data.stage.stage import StageResources
from pipelines.data.stage.table import commit_part, table_parts
from pipelines.data.steps.looks import looks_stage
from pipelines.data.steps.split import split_stage
from pipelines.data.video.frames import CLIP_INPUTS, clip_inputs


def clip_rows_of(path: Path, folder: Path, config: SplitConfig) -> pa.Table:
    """The split stage's rows of a file, committed below a folder."""
    stage = split_stage(config, DecodeConfig(), StageResources())
    uri = str(folder / f"{path.stem}-split")
    rows = stage.function(uri)([{"work_key": path.stem, "uri": str(path)}])
    clips = commit_part(stage, uri, rows)
    [part] = table_parts(uri)
    for name, value in (("uri", str(path)), ("split_part", part)):
        clips = clips.append_column(name, pa.array([value] * len(rows)).cast(CLIP_INPUTS.field(name).type))
    return clips


def clip_inputs_of(path: Path, folder: Path, config: SplitConfig) -> list[dict]:
    """Inputs of a stage over clips, for the clips of a file."""
    clips = clip_rows_of(path, folder, config)
    return clip_inputs(clips, picture_keys(clips)).to_pylist()


def clips_with_looks(path: Path, folder: Path, config: LooksConfig | None = None) -> list[dict]:
    """Inputs of a stage that looks at clips, for the one clip of a file; its looks are made."""
    inputs = clip_inputs_of(path, folder, SplitConfig(detector="none"))
    stage = looks_stage(config or LooksConfig(), DecodeConfig(), StageResources())
    uri = str(folder / f"{path.stem}-looks")
    commit_part(stage, uri, stage.function(uri)(inputs))
    [part] = table_parts(uri)
    return [row | {"looks_part": part} for row in inputs]
