import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.data.stage import columns as tables
from pipelines.data.stage.columns import contained, digest_rows, first_places, positions, sort, take
from pipelines.data.upkeep.verify import _repeated

SCHEMA = pa.schema(
    [("name", pa.string()), ("list", pa.list_(pa.struct([("text", pa.string())]))), ("number", pa.int64())]
)


@pytest.fixture(params=[0, 1, 300])
def table(request):
    generator = np.random.default_rng(0)
    rows = [
        {
            "name": f"n{number % 40:03d}" if number % 7 else None,
            "list": [{"text": "x" * (number % 5)}],
            "number": number,
        }
        for number in generator.permutation(request.param).tolist()
    ]
    cuts = [0, 0, 1, 7, 8, 200, request.param]
    return pa.concat_tables(
        [SCHEMA.empty_table()]
        + [pa.Table.from_pylist(rows[start:stop], schema=SCHEMA) for start, stop in itertools.pairwise(cuts)]
    )


@pytest.mark.parametrize("piece", [1, 50, 1 << 14])
def test_rows_are_taken_as_arrow_takes_them(table, piece, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", piece)
    generator = np.random.default_rng(1)
    for count in (0, 1, 500):
        places = generator.integers(0, max(1, table.num_rows), count if table.num_rows else 0)
        assert take(table, places).equals(table.take(pa.array(places)))
        assert take(table["list"], places).equals(table["list"].take(pa.array(places)))
    assert sort(table, ["name", "number"]).equals(table.sort_by([("name", "ascending"), ("number", "ascending")]))


def test_more_text_is_taken_than_one_array_holds():
    text = pa.array(["x" * (1 << 26)])  # 64 MiB, and 40 times as many in all
    column = pa.chunked_array([text] * 40)
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        column.take(pa.array([3]))
    assert take(column, np.array([39, 0])).num_chunks == 1


def test_the_digest_of_rows_is_that_of_their_values_however_they_lie_in_memory():
    said = pa.list_(pa.struct([("text", pa.string()), ("captioner", pa.string())]))
    rows = [
        {"key": f"k{n}", "score": {"a": n / 3, "b": None if n % 3 else 1.0}, "said": [{"text": "é" * n}] * (n % 3)}
        for n in range(40)
    ]
    rows[7] |= {"key": None, "score": None, "said": None}
    schema = pa.schema([("key", pa.string()), ("score", pa.struct([("a", "f8"), ("b", "f8")])), ("said", said)])
    table = pa.Table.from_pylist(rows, schema)
    expected = digest_rows(table)
    pieces = [table.slice(at, 7) for at in range(0, 40, 7)]
    assert digest_rows(pa.concat_tables(pieces)) == expected
    assert digest_rows(table.take(pa.array(range(40)))) == expected
    assert digest_rows(pa.concat_tables([table, table]).slice(40)) == expected
    garbage = pa.array([1.0, 2.0, 3.0], mask=np.array([True, False, True]))  # under nulls
    assert digest_rows(pa.table({"x": garbage})) == digest_rows(pa.table({"x": pa.array([None, 2.0, None])}))
    others = [table.slice(1), table.rename_columns(["key", "score", "x"])]
    for place, change in ((3, {"key": "other"}), (7, {"key": ""}), (7, {"said": []}), (9, {"score": {"a": 3.0}})):
        changed = [row | change if number == place else row for number, row in enumerate(rows)]
        others.append(pa.Table.from_pylist(changed, schema))
    assert len({expected, *map(digest_rows, others)}) == len(others) + 1
    assert digest_rows(schema.empty_table()) == digest_rows(table.slice(40))


def test_values_are_looked_up_as_arrow_does(table):
    some = pa.chunked_array([["n003", "nowhere"], [None, "n003"]])
    names = table["name"]
    assert positions(some, names).to_pylist() == pc.index_in(some, names).to_pylist()
    assert contained(names, some).to_pylist() == pc.is_in(names, some).to_pylist()
    assert take(names, first_places(names)).to_pylist() == pc.unique(names).to_pylist()


@pytest.mark.slow  # takes 5 GB
def test_text_may_be_of_more_than_two_gigabytes():
    each, count = 1 << 20, 2100
    text = pa.py_buffer(np.random.default_rng(0).integers(97, 123, each + count, np.uint8).tobytes())
    bounds = (np.array([start, start + each], np.int32) for start in range(count))  # all in the same memory
    names = pa.chunked_array([pa.StringArray.from_buffers(1, pa.py_buffer(bound), text) for bound in bounds])
    some = names.slice(5, 2)
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        names.combine_chunks()
    assert positions(some, names).to_pylist() == [5, 6]
    assert pc.all(contained(names, names)).as_py()
    assert first_places(names).tolist() == list(range(count))
    assert _repeated(names) == []
