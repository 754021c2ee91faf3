"""Work keys: their texts, by which stage tables and ledgers know what was done, and that they are parsed again."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data import keys
from pipelines.storage import FileInfo

SOURCE = hashlib.sha256(b"source").hexdigest()
CLIP = keys.clip_key(SOURCE, 1.0, 2.5004)


def clips() -> pa.Table:
    columns = {"key": [CLIP, keys.clip_key(SOURCE, 3, 4)], "picture": [[0, 8, 320, 160], [0, 0, 320, 176]]}
    return pa.table(columns, pa.schema([("key", pa.string()), ("picture", pa.list_(pa.int32()))]))


def token_keys() -> list[str]:
    shapes = np.array([[17, 448, 256], [1, 336, 336]], np.int32)
    return keys.token_keys(clips(), shapes, pa.array([True, False])).to_pylist()


def test_texts_stay_as_stage_tables_and_ledgers_have_them():
    assert f"{SOURCE}:00001000-00002500" == CLIP
    assert keys.picture_keys(clips())[0].as_py() == f"{CLIP}+0,8,320,160"
    assert token_keys() == [
        f"{CLIP}@17x448x256+0,8,320,160+psnr",
        f"{SOURCE}:00003000-00004000@1x336x336+0,0,320,176",
    ]
    digest = hashlib.sha256(b"sidecar\0a cat\0a dog").hexdigest()[:16]
    assert keys.caption_key(CLIP, ["a cat", "a dog"], "sidecar") == f"{CLIP}#{digest}"
    assert keys.text_key("a cat") == hashlib.sha256(b"a cat").hexdigest()


@pytest.mark.parametrize("uri", ["/films/a.mp4", "s3://films/a b.mp4", "/films/two\nlines.mp4"])
@pytest.mark.parametrize("version", ["", "etag", "1700000000000000000"])
def test_the_uri_of_a_file_comes_back_out_of_its_key(uri, version):
    file = FileInfo(path="a.mp4", uri=uri, size=12, version=version)
    assert keys.file_key(file) == f"{uri}\n12\n{version}"
    assert keys.uri_of_file(keys.file_key(file)) == uri


def test_all_work_on_a_source_begins_with_it():
    work = [
        SOURCE,
        CLIP,
        *keys.picture_keys(clips()).to_pylist(),
        *token_keys(),
        keys.caption_key(CLIP, [], "metadata"),
    ]
    work.append(keys.ledger_file_key("a.mp4", SOURCE))
    assert {keys.source_of(key) for key in work} == {SOURCE}
    assert set(keys.sources_of(pa.chunked_array([work[:2], work[2:]])).to_pylist()) == {SOURCE}
    assert keys.is_source_id(SOURCE)
    assert not any(map(keys.is_source_id, [CLIP, SOURCE.upper(), SOURCE[1:], "films/a.mp4"]))


def test_files_without_clips_are_told_from_clips_and_failed_sources():
    assert keys.ledger_file_key("films/a.mp4") == "@films/a.mp4"
    assert keys.ledger_file_key("films/a.mp4", SOURCE) == f"{SOURCE}@films/a.mp4"
    names = [keys.ledger_file_key("a.mp4"), CLIP, keys.ledger_file_key("a@b.mp4", SOURCE), SOURCE]
    assert keys.are_ledger_files(pa.chunked_array([names])).to_pylist() == [True, False, True, False]
