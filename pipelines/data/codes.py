"""Codes of clips, fetched from the token stage's table in the order of the shards that they go to."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipelines.data.runner import WORK_KEY, StageTable, read_columns

_BUFFER_BYTES = 1 << 28  # of codes held in memory before they go to a scratch folder
_PIECE = pa.schema([("position", pa.int64()), ("codes", pa.list_(pa.uint16()))])


class CodeReader:
    """Deals the codes of a table out to shards.

    Clips are shuffled, so that every shard has some from almost every file of the table. Each file is read once, and
    its codes are sorted by shard into a scratch folder (TMPDIR), from which shard after shard is put together. Memory
    holds one file, one shard and a buffer.
    """

    def __init__(self, table: StageTable, work_keys: Mapping[str, str]) -> None:
        self._table = table
        self._work_keys = work_keys

    def __call__(self, shards: Sequence[Sequence[str]]) -> Iterator[pa.Array]:
        """For each list of clip ids, their codes in its order, as an array of list<uint16>.

        Raises:
            LookupError: the table lacks a clip.
            OSError: the scratch folder is full.
        """
        wanted = {
            self._work_keys[clip_id]: (shard, position)
            for shard, ids in enumerate(shards)
            for position, clip_id in enumerate(ids)
        }
        with tempfile.TemporaryDirectory(prefix="lumos-publish-") as folder:
            scratch = _Scratch(folder)
            for part in self._table.parts():
                self._sort(part, wanted, scratch)
            if wanted:
                raise LookupError(f"{len(wanted)} clips are not in {self._table.uri}, such as {next(iter(wanted))}")
            for shard in range(len(shards)):
                yield scratch.take(shard)

    @staticmethod
    def _sort(part: str, wanted: dict[str, tuple[int, int]], scratch: "_Scratch") -> None:
        """Put a file's codes where they belong; a key that another file had before is not wanted any more."""
        read = read_columns(part, [WORK_KEY, "codes"])
        found = [(row, *wanted.pop(key)) for row, key in enumerate(read[WORK_KEY].to_pylist()) if key in wanted]
        if not found:
            return
        rows, shards, positions = np.array(sorted(found, key=lambda place: place[1:])).T
        codes = read["codes"].combine_chunks().take(pa.array(rows))
        table = pa.table([pa.array(positions), codes], schema=_PIECE)
        bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        for first, stop in pairwise(bounds):
            scratch.add(int(shards[first]), table.take(pa.array(range(first, stop))))


class _Scratch:
    """Pieces of shards, in memory and in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._pieces: dict[int, list[pa.Table]] = defaultdict(list)
        self._bytes = 0
        self._files: dict[int, list[str]] = defaultdict(list)

    def add(self, shard: int, piece: pa.Table) -> None:
        """Keep a piece."""
        self._pieces[shard].append(piece)
        self._bytes += piece.nbytes
        if self._bytes > _BUFFER_BYTES:
            self._flush()

    def take(self, shard: int) -> pa.Array:
        """The codes of a shard, in order."""
        tables = self._pieces.pop(shard, [])
        for path in self._files.pop(shard, []):
            with pa.ipc.open_file(path) as reader:
                tables.append(reader.read_all())
            os.unlink(path)
        whole = pa.concat_tables(tables or [_PIECE.empty_table()]).sort_by("position")
        return whole["codes"].combine_chunks()

    def _flush(self) -> None:
        for shard, pieces in self._pieces.items():
            path = os.path.join(self._folder, f"{shard}-{len(self._files[shard])}.arrow")
            with pa.ipc.new_file(path, _PIECE) as writer:
                for piece in pieces:
                    writer.write_table(piece)
            self._files[shard].append(path)
        self._pieces.clear()
        self._bytes = 0
