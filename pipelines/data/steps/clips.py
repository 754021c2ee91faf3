"""All clips of a run, a column each, so that millions fit: what is known of them, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.config import TokenConfig, plan_shape
from pipelines.data.keys import picture_keys
from pipelines.data.reasons import CANNOT_BE_KEPT, all_of
from pipelines.data.scores import SCORES, Thresholds, scores_of
from pipelines.data.snapshot.ledger import Verdicts
from pipelines.data.stage.columns import take
from pipelines.data.stage.table import PART, StageTable
from pipelines.data.steps.decide import decide, keeps


class Clips:
    """The clips: rows of the split stage (with ``PART``), URIs of their files and of the files of the stage's table."""

    def __init__(self, table: pa.Table, uris: pa.ChunkedArray, parts: Sequence[str]) -> None:
        count = table.num_rows
        names = pa.array(parts, pa.string())
        split_part = [pa.DictionaryArray.from_arrays(chunk, names) for chunk in table[PART].chunks]
        self.table = (
            table.drop_columns(["scores", PART])
            .append_column("uri", uris)
            .append_column("split_part", pa.chunked_array(split_part, pa.dictionary(pa.int32(), pa.string())))
        )
        self.scores = {name: np.full(count, np.nan) for name in SCORES}  # nan where nobody looked
        for name in (score.name for score in scores_of("split")):
            self.scores[name][:] = pc.struct_field(table["scores"], name).to_numpy()
        self.shapes = np.zeros((count, 3), np.int32)  # frames, width, height to encode
        self.verdicts = Verdicts(count)

    def of(self, indices: NDArray[np.int64]) -> pa.Table:
        """Rows of some clips, with the URI of their file and that of the split stage's file they are in."""
        return take(self.table, indices)

    def add_looks(self, looks: StageTable, clips: NDArray[np.int64]) -> None:
        """Note which file of the looks stage's table has the looks of each of some clips, for who is to read them."""
        numbers = np.full(self.table.num_rows, -1, np.int32)
        parts = looks.parts()
        for places, rows in looks.pieces([PART], picture_keys(self.of(clips)), parts=parts):
            numbers[clips[places]] = rows[PART].to_numpy()
        indices = pa.array(numbers, mask=numbers < 0)
        column = pa.DictionaryArray.from_arrays(indices, pa.array(parts, pa.string()))
        self.table = self.table.append_column("looks_part", column)

    def decide(self, thresholds: Thresholds) -> None:
        """Reject those of the kept clips whose scores are out of bounds."""
        kept = self.verdicts.kept
        wrong = ~keeps({name: values[kept] for name, values in self.scores.items()}, thresholds)
        for index in kept[wrong].tolist():
            scores = {name: float(values[index]) for name, values in self.scores.items()}
            self.verdicts.set(index, *decide(scores, thresholds))

    def plan_shapes(self, config: TokenConfig) -> None:
        """Settle what of each kept clip is to be encoded; reject those that are too short or too small."""
        kept = self.verdicts.kept
        have = np.floor(self.scores["duration"][kept] * config.fps + 0.01)  # spans are rounded to milliseconds
        image = self.scores["image"][kept]
        columns = [self.scores["aspect"][kept], self.scores["height"][kept], np.where(image > 0, 1, have), image]
        kinds, kind_of = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        for number, (aspect, height, count, is_image) in enumerate(kinds.tolist()):
            members = kept[kind_of == number]
            scores = {"aspect": aspect, "height": height, "duration": count / config.fps, "image": is_image}
            shape = plan_shape(scores, config)
            if not isinstance(shape, str):
                self.shapes[members] = (shape.num_frames, shape.width, shape.height)
                continue
            self._reject(members, scores, shape, config)

    def _reject(
        self, members: NDArray[np.int64], scores: Mapping[str, float], reason: str, config: TokenConfig
    ) -> None:
        """Reject clips that are too short or too small; those that a person keeps are enlarged, if that is all."""
        enlarged = plan_shape(scores, replace(config, max_enlargement=None))
        for index in members.tolist():
            if isinstance(enlarged, str) and self.verdicts.expose(index):
                self.verdicts.set(index, "rejected", all_of([reason, CANNOT_BE_KEPT]))
                continue
            self.verdicts.set(index, "rejected", reason)
            if not isinstance(enlarged, str):
                self.shapes[index] = (enlarged.num_frames, enlarged.width, enlarged.height)

    def score_column(self) -> pa.StructArray:
        """As the ledger's column."""
        return pa.StructArray.from_arrays(
            [pa.array(self.scores[name], from_pandas=True) for name in SCORES], names=list(SCORES)
        )
