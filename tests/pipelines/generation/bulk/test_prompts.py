from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import UserError
from pipelines.generation.bulk.prompts import Prompt, read_prompts

EXPECTED = [Prompt(text="a red square, moving", seed=7, id="x"), Prompt(text="ein Würfel")]


def test_a_list_is_taken_as_it_is() -> None:
    assert read_prompts(("one", " two ")) == [Prompt(text="one"), Prompt(text="two")]


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone, with a comma\r\n\r\n  zwei für alle\n".encode())
    assert read_prompts(str(file)) == [Prompt(text="one, with a comma"), Prompt(text="zwei für alle")]


def test_rows_of_each_kind_of_file_give_the_same_prompts(tmp_path: Path) -> None:
    csv, jsonl, parquet = (tmp_path / f"prompts.{suffix}" for suffix in ("csv", "jsonl", "parquet"))
    csv.write_text('id,prompt,seed,other\nx,"a red square, moving",7,-\n,ein Würfel,,-\n', encoding="utf-8")
    jsonl.write_text('{"prompt": "a red square, moving", "seed": 7, "id": "x"}\n\n{"prompt": "ein Würfel"}\n')
    table = pa.table({"prompt": ["a red square, moving", "ein Würfel"], "seed": [7, None], "id": ["x", None]})
    pq.write_table(table, parquet)
    assert read_prompts(str(csv)) == read_prompts(str(jsonl)) == read_prompts(str(parquet)) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text,seed\nhello,1\n", "no column prompt, only text, seed"),
        ("p.csv", "", "no column prompt, only none"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.csv", "prompt\na red square, moving left\n", "line 2: 2 values for 1 columns: quote a prompt"),
        ("p.csv", "prompt,Seed\na,3\n", "it has a column 'Seed', which is not read: rename it to 'seed'"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "sed": 3}\n',
            "line 2: it has a column 'sed'.* rename it to 'seed'",
        ),
        ("p.csv", "prompt,seed\nhello,x\n", "line 2: the seed is 'x'"),
        ("p.csv", "prompt,seed\nhello,-1\n", "the seed is '-1'"),
        ("p.csv", "prompt,seed\n,1\n", "line 2: the prompt is ''"),
        ("p.txt", " \n\n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "no column prompt, only text"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: the prompt is 3"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}\n', "the seed is 1.5"),
        ("p.jsonl", "{", "line 1: it is no JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"line 2: it is no JSON: Expecting .* column 15"),
        ("p.jsonl", "[1]\n", "no JSON object"),
        ("p.parquet", "PAR1", "cannot be read as parquet"),
        ("p.md", "hello", "unknown kind"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(str(file))
    assert str(file) in str(error.value)


def test_every_mistake_of_a_file_is_told_and_of_many_how_many(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,seed,id\na,x,1\nb,1,2\n,2,3\nc,3,2\nd,4,5,6\n")
    with pytest.raises(UserError) as error:
        read_prompts(str(file))
    lines = str(error.value).split("\n  ")
    assert lines[0] == "4 mistakes:"
    for line, words in zip(
        lines[1:],
        ("line 2: the seed is 'x'", "line 4: the prompt is ''", "line 5: the id '2' is that of", "line 6: 4 values"),
        strict=True,
    ):
        assert f"{file}, {words}" in line
    file.write_text("prompt,seed\n" + "a,x\n" * 12)
    with pytest.raises(UserError) as error:
        read_prompts(str(file))
    assert str(error.value).startswith("12 mistakes:")
    assert str(error.value).endswith(
        "line 11: the seed is 'x'; it must be a whole number in 0..2^63-1, or be left out\n  and 2 more"
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "cut off \\ud83d"}', r"line 1: prompt, 'cut off \\ud83d', holds half a character at 8"),
        ('{"prompt": "a", "id": "\\ud83d"}', "line 1: id, .* holds half a character"),
        ('{"prompt": "a", "image": "\\ud83d.png"}', "line 1: image, .* holds half a character"),
    ],
)
def test_half_a_character_is_told_of_its_row(tmp_path: Path, row: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(row)
    with pytest.raises(UserError, match=words):
        read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(UserError, match=r"item 0: prompt, .* holds half a character"):  # as of bytes at a terminal
        read_prompts((b"a \xff".decode(errors="surrogateescape"),))


def test_a_column_that_is_there_twice_and_dates_beyond_all_years_are_told(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed,prompt\na,1,b\n")
    with pytest.raises(UserError, match="it has several columns 'prompt': keep one of them"):
        read_prompts(str(tmp_path / "p.csv"))
    far = pa.table({"prompt": ["a"], "id": pa.array([2**62], pa.timestamp("us"))})
    pq.write_table(far, tmp_path / "p.parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_a_missing_file_and_an_empty_list_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="empty list"):
        read_prompts(())
    with pytest.raises(UserError, match="item 1: the prompt is ' '"):
        read_prompts(("one", " "))
