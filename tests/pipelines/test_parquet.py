import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.stage.columns import parquet_bytes
from pipelines.parquet import read_parquet, read_parquet_rows


class Watched(io.BytesIO):
    """A file that knows which threads read it, and how much."""

    def __init__(self, data):
        super().__init__(data)
        self.threads, self.bytes = set(), 0

    def read(self, size=-1):
        self.threads.add(threading.get_ident())
        data = super().read(size)
        self.bytes += len(data)
        return data


def test_parquet_is_read_by_the_calling_thread_alone():
    table = pa.table({"name": [f"n{number % 40:03d}" for number in range(300)], "number": range(300)})
    file = Watched(parquet_bytes(table, row_group_rows=50))
    assert read_parquet(file) == table
    assert read_parquet(file.getvalue(), ["number"]) == table.select(["number"])
    assert pa.concat_tables(read_parquet_rows(file, "name", ["n001"])) == table.filter(pc.field("name") == "n001")
    assert file.threads == {threading.get_ident()}


def test_of_other_row_groups_the_chosen_column_alone_is_read():
    names = [f"n{number // 100}" for number in range(1000)]
    wide = pa.table({"name": names, "data": [np.random.default_rng(number).bytes(1000) for number in range(1000)]})
    file = Watched(parquet_bytes(wide, row_group_rows=100))
    found = pa.concat_tables(read_parquet_rows(file, "name", ["n3", "absent"], ["data"]))
    assert found["data"].to_pylist() == wide["data"][300:400].to_pylist()
    assert 100_000 < file.bytes < 200_000
