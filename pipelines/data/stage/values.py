"""Large values of many rows, such as codes and fingerprints, read where they are, some files of a table at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.stage.columns import take
from pipelines.data.stage.table import read_parts
from pipelines.errors import JobError

_LEAST_BYTES = 64 << 20  # of the values of a group, if there are as many
_MOST_BYTES = 256 << 20  # likewise at most, but for a single file of more
_MANY_GROUPS = 512  # from which on they are larger than the least
_FILE_BYTES = 1 << 17  # that take as long to read as it takes to open a file


@dataclass(frozen=True)
class ValueGroup:
    """Values of some rows that are read together."""

    rows: NDArray[np.int64]  # numbers of the rows
    read: Callable[[], pa.ChunkedArray]  # can be pickled; the value of each, in this order


@dataclass(frozen=True, kw_only=True)
class StoredValues:
    """A column of a table's files, of many rows, and where to find each."""

    files: pa.ChunkedArray  # of each row the URI of its file, dictionary-encoded
    keys: pa.ChunkedArray  # by which the file has it
    key_column: str
    column: str

    def groups(self, sizes: NDArray[np.int64]) -> Iterator[ValueGroup]:
        """All rows in groups of some size; the rows of a file are in one of them.

        Sizes are bytes of the value of each row, roughly.
        """
        if not len(self.files):
            return
        column = self.files.unify_dictionaries().combine_chunks()
        names, numbers = column.dictionary, column.indices.to_numpy()
        order = np.argsort(numbers, kind="stable")
        used, firsts, lengths = np.unique(numbers[order], return_index=True, return_counts=True)
        totals = np.add.reduceat(sizes[order], firsts) + _FILE_BYTES
        most = min(max(_LEAST_BYTES, int(totals.sum()) // _MANY_GROUPS), _MOST_BYTES)
        group_of = (np.cumsum(totals) - totals) // most
        for group in np.unique(group_of):
            own = group_of == group
            first = int(firsts[own][0])
            rows = order[first : first + int(lengths[own].sum())]
            uris = names.take(pa.array(used[own])).to_pylist()
            keys = take(self.keys, rows).combine_chunks()
            yield ValueGroup(
                rows, partial(read_values, uris, lengths[own].tolist(), keys, self.key_column, self.column)
            )


def read_values(
    uris: Sequence[str], lengths: Sequence[int], keys: pa.Array, key_column: str, column: str
) -> pa.ChunkedArray:
    """Values of rows by their keys, the first ``lengths[0]`` of them from the first file, and so on.

    Of a file without the column, as an earlier version wrote it, they are null.

    Raises:
        JobError: a file lacks a row.
    """
    found, first = [], 0
    for uri, length, table in zip(uris, lengths, read_parts(uris, [key_column, column]), strict=True):
        wanted = keys.slice(first, length)
        first += length
        places = pc.index_in(wanted, table[key_column].combine_chunks())
        if places.null_count:
            lacking = wanted.filter(pc.is_null(places))
            raise JobError(
                f"{uri} lacks {len(lacking)} of {length} rows, such as that of {lacking[0]}: it was changed meanwhile; "
                "give the same command again"
            )
        if column in table.column_names:
            found.append(table[column].combine_chunks().take(places))
        else:  # of an earlier version
            found.append(pa.nulls(length, pa.binary()))
    return pa.chunked_array(found)
