import hashlib
import os

import pytest

from pipelines import storage
from pipelines.errors import UserError


def test_a_write_appears_whole_and_leaves_nothing_else(tmp_path):
    uri = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes_atomic(uri, b"one")
    storage.write_bytes_atomic(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert os.listdir(tmp_path / "a") == ["b.bin"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        storage.write_bytes_atomic(str(target), b"data")
    assert os.listdir(tmp_path) == ["folder"]


def test_json_round_trip_is_stable(tmp_path):
    uri = str(tmp_path / "x.json")
    storage.write_json_atomic(uri, {"b": [1, 2], "a": "ü"})
    first = storage.read_bytes(uri)
    storage.write_json_atomic(uri, {"a": "ü", "b": [1, 2]})
    assert storage.read_bytes(uri) == first
    assert storage.read_json(uri) == {"a": "ü", "b": [1, 2]}


@pytest.mark.parametrize("name", ["a b.mp4", "q'u\"o.mp4", "ünï.mp4", "new\nline.mp4", "star*[1].mp4", "c::d#e.mp4"])
def test_any_local_name_is_listed_hashed_and_copied(tmp_path, name):
    (tmp_path / name).write_bytes(b"content")
    [found] = storage.list_files(str(tmp_path), suffixes=[".mp4"])
    assert (found.path, found.size) == (name, 7)
    assert storage.sha256_file(found.uri) == hashlib.sha256(b"content").hexdigest()
    with storage.local_copy(found.uri) as path:
        assert path == str(tmp_path / name)


def test_list_files_is_recursive_sorted_and_skips_hidden(tmp_path):
    for name in ("b/2.mp4", "a.MP4", "b/1.mp4", ".hidden.mp4", "b/.x/3.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "broken.mp4").symlink_to(tmp_path / "gone")
    found = storage.list_files(str(tmp_path), suffixes=[".mp4"])
    assert [(file.path, file.size) for file in found] == [
        ("a.MP4", 0),
        ("b/1.mp4", 0),
        ("b/2.mp4", 0),
        ("broken.mp4", -1),
    ]


def test_a_changed_file_has_another_version(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    before = storage.describe_file(str(tmp_path / "a"), "a")
    os.utime(tmp_path / "a", ns=(1, 1))
    assert storage.describe_file(str(tmp_path / "a"), "a") != before


def test_an_object_store_offers_the_same():
    root = "memory://bucket/set"
    storage.write_bytes_atomic(storage.join(root, "v/1.bin"), b"abc")
    storage.write_json_atomic(storage.join(root, "m.json"), [1])
    assert storage.list_names(root) == ["m.json", "v"]
    assert storage.is_dir(root)
    assert not storage.exists(storage.join(root, "other"))
    assert storage.list_names(storage.join(root, "other")) == []
    assert storage.sha256_file(storage.join(root, "v/1.bin")) == hashlib.sha256(b"abc").hexdigest()
    [found] = storage.list_files(root, suffixes=[".bin"])
    assert (found.path, found.uri, found.size) == ("v/1.bin", "memory://bucket/set/v/1.bin", 3)
    with storage.local_copy(found.uri) as path, open(path, "rb") as file:
        assert file.read() == b"abc"
    assert not os.path.exists(path)
    data = os.urandom(1 << 19)
    storage.write_bytes_atomic(found.uri, data)
    with storage.open_ranges(found.uri) as file:
        file.seek(1000)
        assert file.read(10) == data[1000:1010]
        file.seek(-10, os.SEEK_END)
        assert file.read(100) == data[-10:]
    storage.remove(root)
    storage.remove(root)
    assert not storage.exists(storage.join(root, "m.json"))


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="nope://bucket"):
        storage.filesystem("nope://bucket/x")
