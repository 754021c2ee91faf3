"""Codes of clips, read from the token stage's table where they are, some of its files at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.stage.columns import take
from pipelines.data.stage.stage import WORK_KEY
from pipelines.data.stage.table import read_parts
from pipelines.errors import JobError

_LEAST_BYTES = 64 << 20  # of the codes of a group, if there are as many
_MOST_GROUPS = 512  # as each is dealt to all shards


@dataclass(frozen=True)
class CodeGroup:
    """Codes of some clips that are read together."""

    clips: NDArray[np.int64]  # numbers of the clips
    read: Callable[[], pa.ChunkedArray]  # can be pickled; the codes of each in this order, as list<uint16>


def group_codes(files: pa.ChunkedArray, work_keys: pa.ChunkedArray, sizes: NDArray[np.int64]) -> Iterator[CodeGroup]:
    """The codes of all clips in groups, few enough that they can be dealt to as many shards; a file is in one of them.

    Args:
        files: URI of the file that has each clip's codes, dictionary-encoded.
        work_keys: By which it has them.
        sizes: Bytes of the codes of each.
    """
    if not len(files):
        return
    column = files.unify_dictionaries().combine_chunks()
    names, numbers = column.dictionary, column.indices.to_numpy()
    order = np.argsort(numbers, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    used, firsts, lengths = np.unique(numbers[order], return_index=True, return_counts=True)
    group_of = before[firsts] // max(_LEAST_BYTES, int(sizes.sum()) // _MOST_GROUPS)
    for group in np.unique(group_of):
        own = group_of == group
        first = int(firsts[own][0])
        clips = order[first : first + int(lengths[own].sum())]
        uris = names.take(pa.array(used[own])).to_pylist()
        keys = take(work_keys, clips).combine_chunks()
        yield CodeGroup(clips, partial(read_codes, uris, keys, lengths[own].tolist()))


def read_codes(uris: Sequence[str], work_keys: pa.Array, lengths: Sequence[int]) -> pa.ChunkedArray:
    """Codes of clips by their work keys, the first ``lengths[0]`` of them from the first file, and so on.

    Raises:
        JobError: a file lacks a clip.
    """
    found, first = [], 0
    for uri, length, rows in zip(uris, lengths, read_parts(uris, [WORK_KEY, "codes"]), strict=True):
        wanted = work_keys.slice(first, length)
        first += length
        places = pc.index_in(wanted, rows[WORK_KEY].combine_chunks())
        if places.null_count:
            lacking = wanted.filter(pc.is_null(places))
            raise JobError(
                f"{uri} lacks {len(lacking)} of {length} rows, such as that of {lacking[0]}: it was changed meanwhile; "
                "give the same command again"
            )
        found.append(rows["codes"].combine_chunks().take(places))
    return pa.chunked_array(found, pa.list_(pa.uint16()))
