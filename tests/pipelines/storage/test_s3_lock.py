"""The lock of a dataset in S3: an object that only one run can make, and that expires."""

import itertools
import json
import os
import re
import threading
import time

import pytest
from click.testing import CliRunner

from jobs.data import command as data_command
from pipelines import storage
from pipelines.errors import JobError, UserError
from pipelines.storage import lock, s3
from pipelines.storage.lock import check_lock, dataset_lock

OTHER_OWNER = json.dumps(
    {"pid": 7, "host": "elsewhere", "since": "2026-01-01", "command": "lumos curate", "token": "x"}
).encode()


def test_the_lock_is_held_through_faults_and_by_one_only(proxy, bucket, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    proxy.share = 0.3
    with dataset_lock(f"{bucket}/d"):
        begin = time.monotonic()
        while proxy.requests["PUT"] < 6:
            assert time.monotonic() - begin < 60
            time.sleep(0.1)
        with pytest.raises(UserError, match="in use by another run"), dataset_lock(f"{bucket}/d"):
            pass
        check_lock(f"{bucket}/d")


def test_the_lock_of_a_killed_run_expires(bucket, direct, monkeypatch, capsys):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, OTHER_OWNER)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 9.0)
    begin = time.monotonic()
    with dataset_lock(uri):
        assert json.loads(direct.cat_file(path))["pid"] == os.getpid()
    assert time.monotonic() - begin > 2
    assert not direct.exists(path)
    said = capsys.readouterr().err
    assert "was in use by another run (pid 7 on elsewhere since 2026-01-01: lumos curate), whose last sign" in said
    silent, left = re.search(r"life is (\d+) s old: waiting up to (\d+) s", said).groups()
    assert int(silent) + int(left) in range(8, 11)  # seconds, each rounded by itself


def test_a_lock_taken_between_two_looks_at_it_is_not_taken_back(bucket, direct, monkeypatch):
    """As by a run that was cut off as it renewed, and comes back when another takes over."""
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    looks = []

    def then_taken(look):
        def looked(*arguments, **options):
            found = look(*arguments, **options)
            if not looks:
                direct.pipe_file(path, OTHER_OWNER)
            looks.append(look)
            return found

        return looked

    with pytest.raises(JobError, match="another run took"), dataset_lock(uri):  # noqa: PT012
        store = s3.filesystem(brisk=True)
        monkeypatch.setattr(s3, "describe_object", then_taken(s3.describe_object))
        monkeypatch.setattr(store, "cat_file", then_taken(store.cat_file))
        held = lock._held[uri]
        held.tag = '"of the renewal before"'  # as the answer to the last one was lost
        for _ in range(2):
            held._renew()
        assert direct.cat_file(path) == OTHER_OWNER
        check_lock(uri)


def test_who_waits_for_a_killed_run_is_refused_by_one_that_lives(bucket, direct):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, OTHER_OWNER)
    end = threading.Event()

    def live():
        renewals = itertools.count(1)
        while not end.wait(1.5):
            direct.pipe_file(path, OTHER_OWNER.replace(b'"x"', b'"x", "renewals": %d' % next(renewals)))

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(UserError, match=r"in use by another run \(pid 7 .* just now: wait"), dataset_lock(uri):
            pass
    finally:
        end.set()
        other.join()
    assert direct.exists(path)


def test_who_waits_for_a_killed_run_goes_on_when_the_lock_is_taken_away(bucket, direct):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, OTHER_OWNER)
    later = threading.Timer(1.5, direct.rm_file, (path,))
    later.start()
    with dataset_lock(uri):
        assert json.loads(direct.cat_file(path))["pid"] == os.getpid()
    later.join()


def test_who_waits_for_a_killed_run_bears_a_store_that_fails_now_and_then(bucket, direct, monkeypatch):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, OTHER_OWNER)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 3.0)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.2)
    read, looks = lock._read, []

    def fail_often(uri):
        looks.append(uri)
        if 2 < len(looks) < 7:  # the first two are before it waits
            raise OSError(5, "InternalError", uri)
        return read(uri)

    monkeypatch.setattr(lock, "_read", fail_often)
    with dataset_lock(uri):
        assert json.loads(direct.cat_file(path))["pid"] == os.getpid()


def test_the_lock_of_a_killed_run_is_taken_away_by_hand(bucket, direct):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")

    def unlock(*options):
        return CliRunner().invoke(data_command, ["unlock", uri, *options])

    assert unlock().output == f"{uri} is not locked\n"
    direct.pipe_file(path, OTHER_OWNER)
    refused = unlock()
    assert re.search(r"\(pid 7 on elsewhere .*gave a sign of life \d+ s ago.*with --force", str(refused.exception))
    assert direct.exists(path)
    done = unlock("--force")
    assert re.search(r"is free; it was locked by pid 7 on elsewhere .* sign of life is \d+ s old", done.output)
    assert not direct.exists(path)
    direct.pipe_file(path, b"not ours")
    assert "pid 0 on unknown" in unlock("--force").output


def test_an_expired_lock_is_taken_away_without_force(bucket, direct, monkeypatch):
    path = f"{bucket}/d/.lock".removeprefix("s3://")
    direct.pipe_file(path, OTHER_OWNER)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.0)
    assert "is free" in lock.unlock(f"{bucket}/d")
    assert not direct.exists(path)


def test_a_run_that_lost_its_dataset_stops_at_its_next_commit(bucket, direct, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    path = f"{bucket}/d/.lock".removeprefix("s3://")

    def lose():
        with dataset_lock(f"{bucket}/d"):
            direct.pipe_file(path, OTHER_OWNER)
            for _ in range(300):
                time.sleep(0.1)
                check_lock(f"{bucket}/d")
            pytest.fail("was not stopped")

    with pytest.raises(JobError, match=r"another run took dataset .* over"):
        lose()
    assert json.loads(direct.cat_file(path))["host"] == "elsewhere"


def test_a_run_that_was_halted_asks_before_it_commits(bucket, direct, monkeypatch):
    uri, path = f"{bucket}/d", f"{bucket}/d/.lock".removeprefix("s3://")
    with dataset_lock(uri):
        monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.0)  # as if no sign of life had been given for long
        check_lock(uri)

    def lose():
        with dataset_lock(uri):
            direct.pipe_file(path, OTHER_OWNER)
            check_lock(uri)
            pytest.fail("was not stopped")

    with pytest.raises(JobError, match="took dataset"):
        lose()


def test_a_conditional_write_whose_answer_was_lost_is_told(bucket):
    tag = s3.write_object_if(f"{bucket}/x", b"1", tag=None)
    with pytest.raises(FileExistsError):
        s3.write_object_if(f"{bucket}/x", b"2", tag=None)
    other = s3.write_object_if(f"{bucket}/x", b"2", tag=tag)
    with pytest.raises(FileExistsError):
        s3.write_object_if(f"{bucket}/x", b"3", tag=tag)
    assert s3.describe_object(f"{bucket}/x")[0] == other
    assert storage.read_bytes(f"{bucket}/x") == b"2"
