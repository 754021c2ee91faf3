from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.snapshot.codes import deal_codes
from pipelines.data.stage import table as stage_table
from pipelines.data.stage.table import StageTable
from pipelines.data.steps.tokens import TOKENIZED
from pipelines.errors import JobError
from tests.pipelines.data.stage.test_run import stage


@pytest.fixture
def table(tmp_path):
    """Ten files of thirty clips; the last file has clips of the first again."""
    table = StageTable(str(tmp_path), replace(stage(), schema=TOKENIZED))
    (tmp_path / "stages" / "double" / stage().hash).mkdir(parents=True)
    for part in range(10):
        rows = [
            {"work_key": f"w{number}", "key": f"k{number}", "codes": [number, number + 1] * (1 + number % 3)}
            for number in [*range(30 * part, 30 * part + 30), *(range(5) if part == 9 else ())]
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=TOKENIZED), f"{table.uri}/part-{part}.parquet")
    return table


def ids(numbers, letter="k"):
    return pa.chunked_array([[f"{letter}{number}" for number in numbers]], pa.string())


def deal(table, numbers, shards):
    return list(deal_codes(shards, table=table, clip_ids=ids(numbers), work_keys=ids(numbers, "w")))


@pytest.mark.parametrize("rows", [1, 100, 1 << 16])
def test_each_shard_gets_the_codes_of_its_clips_in_order(table, monkeypatch, rows):
    monkeypatch.setattr(stage_table, "_PIECE_ROWS", rows)
    numbers = np.random.default_rng(0).permutation(300)[:250]
    shards = [ids(part) for part in np.array_split(numbers, 7)]
    found = deal(table, range(300), [*shards, ids([])])
    assert [array.type for array in found] == [pa.list_(pa.uint16())] * 8
    for part, array in zip(np.array_split(numbers, 7), found, strict=False):
        assert array.to_pylist() == [[number, number + 1] * (1 + number % 3) for number in part.tolist()]
    assert len(found[-1]) == 0


def test_each_file_is_read_once(table, monkeypatch):
    read = []

    def counting(part, columns, rows=None):
        read.append(part)
        return pq.read_table(part, columns=columns)

    monkeypatch.setattr(stage_table, "read_columns", counting)
    deal(table, range(300), [ids([number]) for number in range(300)])
    assert len(read) == 10


def test_a_clip_that_is_not_there_is_told(table):
    with pytest.raises(JobError, match=r"lacks 1 of 2 rows, such as that of w300: .* give the same command again"):
        deal(table, [7, 300], [ids([7, 300])])
