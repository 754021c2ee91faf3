"""Codes of clips, fetched from the token stage's table in the order of the shards that they go to."""

import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.stage.table import StageTable


def deal_codes(
    shards: Sequence[pa.ChunkedArray], *, table: StageTable, clip_ids: pa.ChunkedArray, work_keys: pa.ChunkedArray
) -> Iterator[pa.Array]:
    """For each list of clip ids, their codes in its order, as an array of list<uint16>.

    Clips are shuffled, so that every shard has some from almost every file of the table. Each file is read once, and
    its codes go to a scratch file (in TMPDIR), from which shard after shard is put together. Memory holds some files
    and one shard.

    Args:
        shards: Clip ids of each shard.
        table: That holds the codes.
        clip_ids: Of all clips.
        work_keys: Of each of these, by which the table has its codes.

    Raises:
        JobError: the table lacks a clip.
        OSError: the scratch file does not fit.
    """
    ids = pa.chunked_array([chunk for shard in shards for chunk in shard.chunks], pa.string())
    keys = work_keys.take(pc.index_in(ids, clip_ids.combine_chunks())).combine_chunks()
    begins, lengths = np.zeros((2, len(ids)), np.int64)  # of each clip's codes in the scratch file, bytes; and how many
    with tempfile.TemporaryFile(prefix="lumos-publish-") as scratch:
        for places, rows in table.pieces(["codes"], keys):
            codes = rows["codes"].combine_chunks()
            counts = pc.list_value_length(codes).to_numpy().astype(np.int64)
            begins[places] = scratch.tell() + 2 * (np.cumsum(counts) - counts)
            lengths[places] = counts
            scratch.write(codes.flatten().to_numpy())
        scratch.flush()
        first = 0
        for shard in shards:
            own = slice(first, first + len(shard))
            first = own.stop
            parts = [
                os.pread(scratch.fileno(), 2 * length, begin)
                for begin, length in zip(begins[own].tolist(), lengths[own].tolist(), strict=True)
            ]
            ends = np.cumsum(lengths[own], dtype=np.int32)
            yield pa.ListArray.from_arrays(np.append(np.int32(0), ends), np.frombuffer(b"".join(parts), np.uint16))
