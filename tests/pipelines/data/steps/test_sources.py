import hashlib
import os
import shutil
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.captions.given import CaptionSource, clean_captions, find_captions, share_captions
from pipelines.data.settings import CaptionConfig, SourceConfig
from pipelines.data.steps.sources import HASHED, first_paths, hash_file, list_sources
from pipelines.errors import UserError
from pipelines.storage import http
from tests.pipelines.data.videos import write_table


def listed(path, **options):
    return list_sources(SourceConfig(path=str(path), **options))["path"].to_pylist()


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.mp4", "deep/c.MOV", "notes.txt", ".hidden.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(name.encode())
    return tmp_path / "videos"


def test_a_folder_is_searched_to_its_depth(folder):
    assert listed(folder) == ["a.mp4", "b.mp4", "deep/c.MOV"]
    assert listed(folder, extensions=(".mov",)) == ["deep/c.MOV"]


def test_a_glob_a_file_and_a_table_name_videos_too(folder, monkeypatch):
    assert listed(folder / "*.mp4") == ["a.mp4", "b.mp4"]
    assert listed(folder / "**" / "*.MOV") == ["deep/c.MOV"]
    assert listed(folder / "**" / "**" / "*.MOV") == ["deep/c.MOV"]
    assert listed(folder / "a.mp4") == ["a.mp4"]
    table = write_table(folder / "list.csv", [("b.mp4", "x"), ("gone.mp4", "y"), (str(folder / "a.mp4"), "z")])
    assert listed(table) == ["b.mp4", "gone.mp4", str(folder / "a.mp4")]
    monkeypatch.chdir(folder)
    assert listed("*.mp4") == ["a.mp4", "b.mp4"]
    assert listed("deep") == ["c.MOV"]


def test_a_folder_may_have_a_name_like_a_glob(folder):
    odd = folder.parent / "set [1]*"
    shutil.copytree(folder, odd)
    assert listed(odd) == ["a.mp4", "b.mp4", "deep/c.MOV"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "source.path .*nowhere does not exist"),
        ("*.avi", "no file matches source.path"),
        ("empty", r"no video files under .*empty; looked for \*.mp4"),
        ("none.csv", "none.csv has no rows"),
        ("other.csv", r"no column 'path'; it has 'file'"),
        ("broken.parquet", "cannot be read as a table"),
    ],
)
def test_what_is_not_there_is_told_before_anything_else(folder, path, message):
    (folder / "empty").mkdir()
    (folder / "none.csv").write_text("path,caption\n")
    (folder / "other.csv").write_text("file,caption\na.mp4,x\n")
    (folder / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=message):
        listed(folder / path)


def test_a_changed_file_is_other_work(folder):
    before = list_sources(SourceConfig(path=str(folder)))["work_key"].to_pylist()
    os.utime(folder / "a.mp4", ns=(1, 1))
    after = list_sources(SourceConfig(path=str(folder)))["work_key"].to_pylist()
    assert before[0] != after[0]
    assert before[1:] == after[1:]


def test_a_file_that_cannot_be_read_says_why(folder):
    (folder / "link.mp4").symlink_to("nowhere")
    assert hash_file(str(folder / "link.mp4"))["error"].startswith("missing_file (permanent)")
    assert hash_file(str(folder))["error"].startswith("not_a_video (permanent)")
    assert hash_file(str(folder / "a.mp4"))["error"] is None


def test_one_content_is_one_source_under_its_lowest_path():
    rows = {"path": ["b", "a", "c", "x"], "source_id": ["2", "1", "1", None], "uri": ["/b", "/a", "/c", "/x"]}
    first = first_paths(pa.table(rows))
    assert first.select(["source_id", "path"]).to_pylist() == [
        {"source_id": "1", "path": "a"},
        {"source_id": "2", "path": "b"},
    ]
    assert first_paths(pa.table(rows).slice(0, 1)).num_rows == 1
    assert HASHED.names == ["work_key", "source_id", "error"]


# --------------------------------------------------------------------------------------------------------- captions


def captions(folder, config=None, path=None):
    source = SourceConfig(path=str(path or folder))
    found = find_captions(config or CaptionConfig(), source, list_sources(source))
    return found.captioner, {uri.removeprefix(str(folder) + "/"): texts for uri, texts in found.texts.items()}


def test_captions_come_from_a_table_in_the_folder(folder):
    write_table(
        folder / "captions.csv", [("a.mp4", 'one, "quoted"\nline'), ("./deep/c.MOV", "two"), ("a.mp4", "three")]
    )
    expected = {"a.mp4": ('one, "quoted"\nline', "three"), "deep/c.MOV": ("two",)}
    assert captions(folder) == ("metadata", expected)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_captions_come_from_any_kind_of_named_table(folder, suffix):
    path = folder.parent / f"meta.{suffix}"
    rows = {"file": ["videos/a.mp4", str(folder / "b.mp4")], "text": ["first", "second"], "n": [1, 2]}
    if suffix == "csv":
        path.write_text("file,text,n\n" + "".join(f"{f},{t},{n}\n" for f, t, n in zip(*rows.values(), strict=True)))
    elif suffix == "jsonl":
        import json

        lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.table(rows), path)
    config = CaptionConfig(file=str(path), path_column="file", caption_column="text")
    assert captions(folder, config) == ("metadata", {"a.mp4": ("first",), "b.mp4": ("second",)})


def test_names_that_are_not_utf8_are_kept_under_an_escaped_name(folder):
    odd = folder / os.fsdecode(b"caf\xe9 100%.mp4")
    odd.write_bytes(b"something else")
    odd.with_suffix(".txt").write_text("a coffee house")
    for path in (folder, f"{folder}/*.mp4", f"file://{folder}"):
        listing = list_sources(SourceConfig(path=str(path)))
        [row] = [row for row in listing.to_pylist() if row["path"].startswith("caf")]
        assert row["path"] == "caf\\xe9 100%.mp4"
        assert row["size"] == 14
        assert hash_file(row["uri"])["source_id"] == hashlib.sha256(b"something else").hexdigest()
    assert ("a coffee house",) in captions(folder)[1].values()


def test_captions_come_from_sidecars(folder):
    (folder / "a.txt").write_text("  beside\nthe video ", encoding="utf-8")
    assert captions(folder) == ("sidecar", {"a.mp4": ("  beside\nthe video ",)})


def test_a_glob_and_a_file_have_captions_beside_them_too(folder, monkeypatch):
    write_table(folder / "captions.csv", [("a.mp4", "one"), ("deep/c.MOV", "two")])
    expected = ("metadata", {"a.mp4": ("one",), "deep/c.MOV": ("two",)})
    assert captions(folder, path=folder / "**" / "*.MOV") == expected
    assert captions(folder, path=folder / "a.mp4") == expected
    (folder / "b.txt").write_text("beside")
    assert captions(folder, path=folder / "b.mp4") == ("sidecar", {"b.mp4": ("beside",)})
    monkeypatch.chdir(folder)
    for path in ("*.mp4", "a.mp4"):
        assert find_captions(CaptionConfig(), SourceConfig(path=path), list_sources(SourceConfig(path=path))).texts


def test_a_file_without_captions_gets_those_of_another_with_its_content():
    rows = {"uri": list("zyxwvu"), "path": list("123456"), "source_id": ["s", "t", "s", "s", None, None]}
    given = CaptionSource("metadata", {"x": ("a", "b"), "w": ("c",), "y": ("d",), "v": ("e",), "z": ()})
    assert share_captions(given, pa.table(rows)).texts == given.texts | {"z": ("a", "b")}
    assert share_captions(given, pa.table(rows).slice(1, 1)) == given


def test_a_table_of_sources_may_hold_captions(folder):
    table = write_table(folder / "list.csv", [("b.mp4", "from the list")])
    assert captions(folder, path=table) == ("metadata", {"b.mp4": ("from the list",)})
    (folder / "plain.csv").write_text("path\na.mp4\n")
    assert captions(folder, path=folder / "plain.csv") == ("sidecar", {})


def test_bad_caption_tables_are_told(folder):
    (folder / "captions.csv").write_text("file,caption\na.mp4,x\n")
    with pytest.raises(UserError, match=r"no column 'path'; it has 'file', 'caption'"):
        captions(folder)
    with pytest.raises(UserError, match=r"no column 'path', 'words'; it has"):
        captions(folder, CaptionConfig(file=str(folder / "captions.csv"), caption_column="words"))
    with pytest.raises(UserError, match=r"captions.file .*gone.csv does not exist"):
        captions(folder, CaptionConfig(file=str(folder / "gone.csv")))
    with pytest.raises(UserError, match=r"captions.file .*notes.txt is no table"):
        captions(folder, CaptionConfig(file=str(folder / "notes.txt")))
    write_table(folder / "captions.csv", [("wrong/a.mp4", "x")])
    with pytest.raises(UserError, match=r"no caption for any of the 3 videos.*wrong/a.mp4"):
        captions(folder)


def test_captions_are_cleaned():
    assert clean_captions([" a\n b ", "", "a b", "c"], "me") == [
        {"text": "a b", "captioner": "me"},
        {"text": "c", "captioner": "me"},
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,caption\na.mp4,x\nb.mp4,y,z\n", r"line 3, .*Expected 2 columns, got 3: b\.mp4,y,z"),
        (b'path,caption\n"a\n.mp4",x\nb.mp4,y\nc.mp4\n', r"line 5, .*Expected 2 columns, got 1: c\.mp4"),
        (b"path,caption\na.mp4,x\n\xff.mp4,y\n", "line 3, .*invalid UTF8"),
    ],
)
def test_an_error_in_a_csv_file_names_its_line(tmp_path, content, words):
    table = tmp_path / "videos.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=rf"source\.path .*videos\.csv, {words}"):
        list_sources(SourceConfig(path=str(table)))


def test_a_web_server_that_is_dead_or_silent_is_told_in_seconds(monkeypatch):
    monkeypatch.setattr(http, "_PATIENCE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/videos/"
        with pytest.raises(UserError, match="cannot be used: Connection refused; check the address"):
            list_sources(SourceConfig(path=address))
        silent.listen()
        with pytest.raises(UserError, match=r"cannot be used: (no answer|timed out); check the address"):
            list_sources(SourceConfig(path=address))
