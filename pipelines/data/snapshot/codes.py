"""Codes of clips, fetched from the token stage's table in the order of the shards that they go to."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.stage.run import StageTable

_BUFFER_BYTES = 1 << 28  # of codes held in memory before they go to a scratch folder
_DEALT = pa.schema([("position", pa.int64()), ("codes", pa.list_(pa.uint16()))])


class CodeReader:
    """Deals the codes of a table out to shards.

    Clips are shuffled, so that every shard has some from almost every file of the table. Each file is read once, and
    its codes are sorted by shard into a scratch folder (TMPDIR), from which shard after shard is put together. Memory
    holds some files, one shard and a buffer.

    Args:
        table: That holds the codes.
        clip_ids: Of clips.
        work_keys: Of each of these, by which the table has its codes.
    """

    def __init__(self, table: StageTable, clip_ids: pa.ChunkedArray, work_keys: pa.ChunkedArray) -> None:
        self._table = table
        self._clip_ids = clip_ids
        self._work_keys = work_keys

    def __call__(self, shards: Sequence[pa.ChunkedArray]) -> Iterator[pa.Array]:
        """For each list of clip ids, their codes in its order, as an array of list<uint16>.

        Raises:
            JobError: the table lacks a clip.
            OSError: the scratch folder is full.
        """
        sizes = [len(ids) for ids in shards]
        shard_of = np.repeat(np.arange(len(shards)), sizes)
        position_of = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, np.int64)])
        ids = pa.chunked_array([chunk for shard in shards for chunk in shard.chunks], pa.string())
        keys = self._work_keys.take(pc.index_in(ids, self._clip_ids.combine_chunks())).combine_chunks()
        with tempfile.TemporaryDirectory(prefix="lumos-publish-") as folder:
            scratch = _Scratch(folder)
            for places, rows in self._table.pieces(["codes"], keys):
                _deal(rows["codes"].combine_chunks(), shard_of[places], position_of[places], scratch)
            for shard in range(len(shards)):
                yield scratch.take(shard)


def _deal(codes: pa.Array, shards: NDArray[np.int64], positions: NDArray[np.int64], scratch: "_Scratch") -> None:
    """Put codes where they belong."""
    order = np.lexsort((positions, shards))
    shards = shards[order]
    table = pa.table([pa.array(positions[order]), codes.take(pa.array(order))], schema=_DEALT)
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
        whole = pa.concat_tables(tables or [_DEALT.empty_table()]).sort_by("position")
        return whole["codes"].combine_chunks()

    def _flush(self) -> None:
        for shard, pieces in self._pieces.items():
            path = os.path.join(self._folder, f"{shard}-{len(self._files[shard])}.arrow")
            with pa.ipc.new_file(path, _DEALT) as writer:
                for piece in pieces:
                    writer.write_table(piece)
            self._files[shard].append(path)
        self._pieces.clear()
        self._bytes = 0
