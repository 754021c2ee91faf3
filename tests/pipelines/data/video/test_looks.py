"""Reading the table of looks."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.video.looks import LOOKS, encode_jpeg, read_rows


def test_only_the_row_groups_of_the_clips_shown_are_read(tmp_path, monkeypatch):
    image = encode_jpeg(np.zeros((90, 160, 3), np.uint8), 80)
    rows = [{"work_key": f"w{number}", "key": f"k{number}", "images": [image]} for number in range(10)]
    part, read = tmp_path / "part-1.parquet", []
    pq.write_table(pa.Table.from_pylist(rows, LOOKS), part, row_group_size=2)
    read_group = pq.ParquetFile.read_row_group

    def counted(self, group, columns, **options):
        if "images" in columns:
            read.append(group)
        return read_group(self, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [row["key"] for row in read_rows(str(part), "work_key", ["w9", "w3"])] == ["k3", "k9"]
    assert read == [1, 4]
