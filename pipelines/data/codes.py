"""Codes of clips, fetched from the token stage's table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pyarrow as pa

from pipelines.data.runner import WORK_KEY, StageTable, read_columns, read_parts


class CodeReader:
    """Reads codes by clip id; holds where they are, and no codes."""

    def __init__(self, table: StageTable, work_keys: Mapping[str, str]) -> None:
        self._work_keys = work_keys
        self._places: dict[str, tuple[str, int]] = {}  # work key -> part, row
        parts = table.parts()
        for part, keys in zip(parts, read_parts(parts, [WORK_KEY]), strict=True):
            for row, key in enumerate(keys[WORK_KEY].to_pylist()):
                self._places.setdefault(key, (part, row))

    def __call__(self, clip_ids: Sequence[str]) -> pa.Array:
        """Codes of clips, in their order, as an array of list<uint16>."""
        wanted: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for position, clip_id in enumerate(clip_ids):
            part, row = self._places[self._work_keys[clip_id]]
            wanted[part].append((row, position))
        pieces, positions = [pa.array([], pa.list_(pa.uint16()))], []
        for part, places in wanted.items():
            codes = read_columns(part, ["codes"])["codes"].combine_chunks()
            pieces.append(codes.take(pa.array([row for row, _ in places])))
            positions += [position for _, position in places]
        order = pa.array(sorted(range(len(positions)), key=positions.__getitem__), pa.int64())
        return pa.concat_arrays(pieces).take(order)
