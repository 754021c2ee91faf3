import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.stage import values
from pipelines.data.stage.values import StoredValues
from pipelines.data.steps.tokens import TOKENIZED
from pipelines.errors import JobError


@pytest.fixture
def files(tmp_path):
    """Ten files of thirty clips."""
    paths = [f"{tmp_path}/part-{part}.parquet" for part in range(10)]
    for part, path in enumerate(paths):
        rows = [
            {"work_key": f"w{number}", "key": f"k{number}", "codes": [number, number + 1] * (1 + number % 3)}
            for number in range(30 * part, 30 * part + 30)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=TOKENIZED), path)
    return pa.array(paths)


def grouped(files, numbers):
    """Groups of clips by number."""
    names = pa.chunked_array([[f"w{number}" for number in numbers]])
    column = pa.DictionaryArray.from_arrays(pa.array(np.array(numbers) // 30), files)
    sizes = 4 * (1 + np.array(numbers) % 3)
    return list(stored(pa.chunked_array([column]), names).groups(sizes))


def stored(files, keys):
    return StoredValues(files=files, keys=keys, key_column="work_key", column="codes")


@pytest.mark.parametrize("least", [1, 500, 1 << 20])
def test_every_group_reads_the_codes_of_its_clips(files, monkeypatch, least):
    monkeypatch.setattr(values, "_LEAST_BYTES", least)
    monkeypatch.setattr(values, "_FILE_BYTES", 0)
    numbers = np.random.default_rng(0).permutation(300)[:250]
    groups = grouped(files, numbers)
    assert len(groups) == {1: 10, 500: 4, 1 << 20: 1}[least]
    assert sorted(np.concatenate([group.rows for group in groups])) == list(range(250))
    for group in groups:
        own = numbers[group.rows].tolist()
        assert group.read().to_pylist() == [[number, number + 1] * (1 + number % 3) for number in own]


def test_many_small_files_and_many_bytes_are_many_groups(files, monkeypatch):
    monkeypatch.setattr(values, "_LEAST_BYTES", 2 * values._FILE_BYTES)
    assert len(grouped(files, list(range(300)))) == 5
    monkeypatch.setattr(values, "_LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(values, "_MANY_GROUPS", 1)
    monkeypatch.setattr(values, "_MOST_BYTES", 3 * values._FILE_BYTES)
    assert len(grouped(files, list(range(300)))) == 4


def test_each_file_is_read_once(files, monkeypatch):
    monkeypatch.setattr(values, "_LEAST_BYTES", 500)
    read = [uri for group in grouped(files, list(range(300))) for uri in group.read.args[0]]
    assert sorted(read) == files.to_pylist()


def test_no_clips_have_no_groups():
    none = pa.chunked_array([], pa.string())
    assert list(stored(none, none).groups(np.zeros(0, int))) == []


def test_a_clip_that_is_not_there_is_told(files):
    [group] = grouped(files, [7])
    pq.write_table(TOKENIZED.empty_table(), files[0].as_py())
    with pytest.raises(JobError, match=r"lacks 1 of 1 rows, such as that of w7: .* give the same command again"):
        group.read()


def test_a_column_that_a_file_of_an_earlier_version_lacks_is_null(tmp_path):
    rows = {"key": ["a", "b"], "movement": pa.array([b"1", b"2"], pa.binary())}
    paths = [f"{tmp_path}/{name}.parquet" for name in ("old", "new")]
    pq.write_table(pa.table({"key": rows["key"]}), paths[0])
    pq.write_table(pa.table(rows), paths[1])
    found = values.read_values(paths, [1, 2], pa.array(["b", "b", "a"]), "key", "movement")
    assert found.to_pylist() == [None, b"2", b"1"]
