"""Files of a store that are kept on this machine."""

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.storage.cache import local_path
from pipelines.storage.store import S3Store


@pytest.fixture
def uri(bucket, direct, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "cache"))
    direct.pipe_file(f"{bucket}/model/weights", b"w" * 1000)
    return f"{bucket}/model"


def test_what_a_killed_process_left_is_removed(uri, tmp_path, monkeypatch):
    def die(self, *_, **__):
        raise SystemExit  # as a kill, where nobody tidies up

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "get_file", die)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        for _ in range(2):
            with pytest.raises((SystemExit, FileExistsError)):
                local_path(uri)
    assert len(list((tmp_path / "cache").glob(".fetching-*"))) == 1
    path = local_path(uri)
    assert (tmp_path / "cache").joinpath(path, "weights").stat().st_size == 1000
    assert not list((tmp_path / "cache").glob(".fetching-*"))


def test_what_the_store_refuses_is_not_told_as_the_disk(uri, monkeypatch):
    def refuse(self, path, *_, **__):
        raise PermissionError(13, "Access Denied", f"s3://{path}")

    monkeypatch.setattr(S3Store, "get_file", refuse)
    with pytest.raises(
        UserError, match=r"model cannot be read \(Access Denied: s3://.*weights\): these credentials may"
    ):
        local_path(uri)


def test_what_changed_while_it_was_fetched_is_not_kept_under_the_name_of_what_was_there(
    uri, bucket, direct, monkeypatch
):
    get = S3Store.get_file

    def late(self, *arguments, **options):
        direct.pipe_file(f"{bucket}/model/weights", b"n" * 1000)  # another writes, as large
        return get(self, *arguments, **options)

    monkeypatch.setattr(S3Store, "get_file", late)
    assert Path(local_path(uri), "weights").read_bytes() == b"n" * 1000
    direct.pipe_file(f"{bucket}/model/weights", b"w" * 1000)  # and the first is back
    monkeypatch.setattr(S3Store, "get_file", get)
    assert Path(local_path(uri), "weights").read_bytes() == b"w" * 1000
