"""Single rows of a snapshot's shards: of a file only its footer and whole row groups are read, and few are kept.

A footer takes one request (two where it is long), the columns of a row group another one.
"""

import io
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import storage
from pipelines.data.snapshot.read import Bucket, Shard, Snapshot
from pipelines.errors import UserError
from pipelines.parquet import open_parquet

_TAIL_BYTES = 1 << 14  # read of a file's end, in the hope that its footer is no longer
_FOOTER_BYTES = 64 << 20  # of footers, as they are in the files, that are kept
Value = TypeVar("Value")


class _Cache(Generic[Value]):
    """The values used last, up to a number of bytes, and one at least."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._held: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of a key, made (with its size) if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = made = make()
            self.held_bytes += made[1]
            while len(self._held) > 1 and self.held_bytes > self.max_bytes:
                self.held_bytes -= self._held.popitem(last=False)[1][1]
        return self._held[key][0]


@dataclass(frozen=True)
class _Footer:
    """What the end of a shard says about it."""

    metadata: pq.FileMetaData

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each row group, and the number of rows."""
        groups = range(self.metadata.num_row_groups)
        return np.cumsum([0, *(self.metadata.row_group(group).num_rows for group in groups)])

    def leaves(self, columns: Sequence[str]) -> list[int]:
        """Numbers of the Parquet columns that make up some columns."""
        names = [self.metadata.schema.column(index).path for index in range(self.metadata.num_columns)]
        return [index for index, name in enumerate(names) if name.partition(".")[0] in columns]


class RowReader:
    """Rows of a snapshot by bucket and number, in some columns.

    Attributes:
        decoded_bytes: Of all row groups decoded so far.

    Raises:
        UserError: if a shard is gone, is damaged, or is not the file that its manifest names.
    """

    def __init__(self, snapshot: Snapshot, columns: Sequence[str], *, max_bytes: int) -> None:
        self.snapshot = snapshot
        self.columns = list(columns)
        self.decoded_bytes = 0
        self._footers: _Cache[_Footer] = _Cache(_FOOTER_BYTES)
        self._groups: _Cache[pa.Table] = _Cache(max_bytes)
        self._ends = [np.cumsum([shard.rows for shard in bucket.shards]) for bucket in snapshot.manifest.buckets]

    @property
    def held_bytes(self) -> int:
        """Of the decoded row groups that are kept."""
        return self._groups.held_bytes

    def row(self, bucket: int, row: int) -> dict[str, Any]:
        """Row ``row`` of ``Manifest.buckets[bucket]``, whose shards follow one another; lists of codes as an array."""
        shards, ends = self.snapshot.manifest.buckets[bucket].shards, self._ends[bucket]
        number = bisect_right(ends, row)
        if not 0 <= number < len(shards) or row < 0:
            raise IndexError(f"bucket {bucket} has {ends[-1] if len(ends) else 0} rows, none has the number {row}")
        shard, row = shards[number], row - (int(ends[number - 1]) if number else 0)
        starts = self._footer(shard).starts
        group = bisect_right(starts, row) - 1
        table = self._groups.get((shard.path, group), lambda: self._read_group(shard, group))
        place = row - int(starts[group])
        found = {name: table[name][place].as_py() for name in self.columns if name != "codes"}
        return found | ({"codes": table["codes"][place].values.to_numpy()} if "codes" in self.columns else {})

    def has_column(self, bucket: Bucket, name: str) -> bool:
        """Whether the shards of a bucket have a column; the first one is asked."""
        return bool(self._footer(bucket.shards[0]).leaves([name]))

    def _uri(self, shard: Shard) -> str:
        return storage.join(self.snapshot.uri, shard.path)

    def _footer(self, shard: Shard) -> _Footer:
        return self._footers.get(shard.path, lambda: self._read_footer(shard))

    def _read_footer(self, shard: Shard) -> tuple[_Footer, int]:
        uri, size = self._uri(shard), shard.bytes
        tail = self._fetch(uri, max(0, size - _TAIL_BYTES), size)
        length = 8 + int.from_bytes(tail[-8:-4], "little")
        if len(tail) < length <= size:
            tail = self._fetch(uri, size - length, size)
        try:
            # A file of nothing but the footer: of a whole one, Arrow would read more.
            footer = _Footer(pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:])))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error
        if footer.metadata.num_rows != shard.rows:
            raise UserError(
                f"shard {uri} has {footer.metadata.num_rows} rows, its manifest says {shard.rows}: the file was "
                "changed; publish the dataset again"
            )
        return footer, length

    def _read_group(self, shard: Shard, group: int) -> tuple[pa.Table, int]:
        uri, metadata = self._uri(shard), self._footer(shard).metadata
        chunks = [metadata.row_group(group).column(leaf) for leaf in self._footer(shard).leaves(self.columns)]
        begins = [min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))) for chunk in chunks]
        stop = max(at + chunk.total_compressed_size for at, chunk in zip(begins, chunks, strict=True))
        source = _Part(self._fetch(uri, min(begins), stop), min(begins), shard.bytes)
        try:
            with open_parquet(source, metadata=metadata) as file:
                table = file.read_row_group(group, columns=self.columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from error
        self.decoded_bytes += table.nbytes
        return table.combine_chunks(), table.nbytes

    def _fetch(self, uri: str, start: int, stop: int) -> bytes:
        try:
            data = storage.read_range(uri, start, stop)
        except FileNotFoundError as error:
            raise UserError(
                f"{uri} is missing from its snapshot; copy it back, or publish the dataset again"
            ) from error
        if len(data) != stop - start:
            raise _damaged(uri, f"it ends before byte {stop}")
        return data


def _damaged(uri: str, problem: object) -> UserError:
    return UserError(
        f"{uri} is damaged ({problem}); copy it back, or publish the dataset again; "
        "`lumos data verify` looks at all its shards"
    )


class _Part(io.RawIOBase):
    """A file of which some bytes are at hand, for a reader that wants no others."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size = data, start, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._at + size)
        begin, end = self._at - self._start, stop - self._start
        if begin < 0 or end > len(self._data):
            raise OSError(f"bytes {self._at} to {stop} were not fetched")
        self._at = stop
        return self._data[begin:end]
