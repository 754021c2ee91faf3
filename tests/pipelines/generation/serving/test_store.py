"""The store of jobs, in a folder and in S3, for processes that die."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from pipelines.generation.request import VideoRequest
from pipelines.generation.serving import jobs
from pipelines.generation.serving.jobs import Job, JobLostError, JobStore, new_id, request_to_json

_SIZE = VideoSize(width=32, height=32, num_frames=9, fps=12.0)
_REQUEST = request_to_json(VideoRequest(prompt="x", seed=1, size=_SIZE, sampling=SamplingConfig(num_steps=1)))


def job_of(**changes: Any) -> Job:
    values: dict[str, Any] = {"id": new_id(1.0), "owner": "", "model": "m", "request": _REQUEST, "created_at": 1.0}
    return Job(**{**values, "expires_at": 1e12, **changes})


def test_exactly_once_of_processes_that_reach_for_a_job_one_gets_it_and_the_dead_commit_nothing(uri: str) -> None:
    first, second, third = (JobStore(uri, name) for name in ("first", "second", "third"))
    first.give_sign()
    mine = first.create(job_of(worker="first", attempt=1))
    seen = second.read(mine.job.id)
    assert seen is not None
    assert seen.job == mine.job
    assert second.claim(seen) is None  # the first is alive
    first.take_sign_away()
    taken = second.claim(seen)
    assert taken is not None
    assert (taken.job.worker, taken.job.attempt) == ("second", 2)
    assert third.claim(seen) is None  # too late
    with pytest.raises(JobLostError):
        first.change(mine, status="completed", file="video.mp4")
    done = second.change(taken, status="completed", file="video.mp4")
    assert third.claim(done) is None  # nothing is left to do
    now = first.read(mine.job.id)
    assert now is not None
    assert now.job == done.job


def test_a_deleted_job_takes_its_files_along_and_no_late_commit(uri: str) -> None:
    store = JobStore(uri, "worker")
    mine = store.create(job_of(worker="worker"))
    store.write_file(mine.job.id, "video.mp4", b"video")
    assert store.read_file(mine.job.id, "video.mp4") == b"video"
    assert store.ids() == [mine.job.id]
    store.delete(mine.job.id)
    assert store.ids() == []
    assert store.read_file(mine.job.id, "video.mp4") is None
    with pytest.raises(JobLostError):
        store.change(mine, status="completed")
    assert store.read(mine.job.id) is None


def test_names_that_are_no_ids_are_no_jobs(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(json.dumps({"id": "secret"}))
    store = JobStore(str(tmp_path / "jobs"))
    for name in ("../secret", "video_../secret", "", ".lock", "video_" + "g" * 31):
        assert store.read(name) is None
    (tmp_path / "jobs" / f"{new_id(1.0)}.json").write_text("{")  # damaged, as those are that tell no request:
    for changes in ({"request": {}}, {"request": {**_REQUEST, "size": "32x32"}}, {"total": "many"}):
        store.create(job_of(id=new_id(1.0), **changes))
    assert [store.read(job_id) for job_id in store.ids()] == [None] * 4


def test_signs_of_life_grow_old(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path), "worker")
    assert not store.is_alive("worker")
    store.give_sign()
    assert store.is_alive("worker")
    sign = tmp_path / "alive" / "worker"
    old = sign.stat().st_mtime - jobs.LEASE_S - 1
    os.utime(sign, (old, old))
    assert not store.is_alive("worker")
