"""A training whose output in S3 another run took over: it ends, and leaves what is the other's alone."""

import json
import logging
import threading
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from pipelines.errors import JobError
from pipelines.storage import lock
from pipelines.storage.lock import dataset_lock
from pipelines.training import run as run_module
from pipelines.training.config import TrackingConfig
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.record import History, event
from pipelines.training.resume import Beginning
from pipelines.training.run import Fence
from pipelines.training.sender import Sender
from tests.pipelines.training.runs import step_record, tiny_config, wait_until
from tests.pipelines.training.snapshots import write_snapshot
from tests.pipelines.training.test_record import LocalQueue, recorder

OTHER = json.dumps({"pid": 1, "host": "other", "token": "x"}).encode()


@pytest.fixture
def run(bucket, tmp_path):
    """The config of a run in S3, its output and what tells MLflow of it."""
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), f"{bucket}/run")
    config = replace(config, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db", flush_seconds=0.1))
    prepared = prepare(config)
    output = Output(config, snapshot_digest=prepared.dataset_digest)
    output.begin(config)
    history = History(output.metrics_file)
    return output, history, Sender(prepared=prepared, output=output, history=history, kept=dict)


def take_over(output, direct):
    """By another run, which this one has noticed."""
    direct.pipe_file(f"{output.place}/.lock", OTHER)
    lock._held[output.place]._renew()  # as its thread does within 5 s


@pytest.mark.parametrize("said", [event("checkpoint", step=2), step_record(2).to_line()], ids=["checkpoint", "step"])
def test_a_training_whose_output_was_taken_ends_at_once(run, direct, said):
    output, history, _ = run
    queue, ended = LocalQueue(), threading.Event()
    fence = Fence(output, ended.set)
    following = recorder(history, queue, on_event=lambda _: fence.check(output.push), on_record=lambda _: fence.check())
    with pytest.raises(JobError, match="another run took"), dataset_lock(output.place), following:  # noqa: PT012
        queue.lines.append(step_record(1).to_line())
        wait_until(lambda: history.last_step == 1)
        queue.lines.append(event("checkpoint", step=1))
        wait_until(lambda: direct.exists(f"{output.place}/metrics.jsonl"))
        assert not ended.is_set()
        take_over(output, direct)
        queue.lines.append(said)
        assert ended.wait(30)
        fence.close(None)
    assert direct.cat_file(f"{output.place}/metrics.jsonl").count(b"\n") == 1
    with pytest.raises(JobError, match="another run took"), dataset_lock(f"{output.place}2"):  # noqa: PT012
        output.place = f"{output.place}2"
        take_over(output, direct)
        output.check_held()


def test_the_driver_stops_its_workers_when_the_output_was_taken(run, direct, monkeypatch):
    output, history, sender = run
    queue = LocalQueue()

    def fit(*_):
        queue.lines.append(step_record(1).to_line())
        wait_until(lambda: history.last_step == 1)
        take_over(output, direct)
        queue.lines.append(event("checkpoint", step=1))
        wait_until(lambda: False)  # as long as nobody ends it

    monkeypatch.setattr(run_module, "open_queue", lambda: queue)
    monkeypatch.setattr(run_module, "make_job", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "fit_with_patience", fit)
    with pytest.raises(JobError, match="another run took"), dataset_lock(output.place):
        run_module._fit(sender.prepared, output, history, beginning=Beginning(None, []), sender=sender)


def test_mlflow_hears_nothing_more_of_a_run_that_another_goes_on_with(run, direct, caplog):
    output, history, sender = run
    caplog.set_level(logging.WARNING)
    with pytest.raises(JobError, match="another run took"), dataset_lock(output.place):  # noqa: PT012
        with sender:
            history.add([step_record(1)])
            wait_until(lambda: output.run.sent == 1)
            take_over(output, direct)
        sender.end("FAILED")
    assert MlflowClient(output.store.uri).get_run(output.run.run_id).info.status == "RUNNING"
    assert not caplog.messages


def test_of_an_output_that_is_away_is_not_said_that_mlflow_is(run, proxy, caplog, monkeypatch):
    output, history, sender = run
    with sender:
        wait_until(lambda: output.run.run_id)

        def fail():
            raise OSError(5, "no answer", f"{output.place}/metrics.tail.jsonl")

        monkeypatch.setattr(output.mirror, "keep_record", fail)
        history.add([step_record(1)])
        wait_until(lambda: caplog.messages)
    said = f"The output cannot be reached; training goes on, the record is in {output.folder} and"
    assert caplog.messages[0].startswith(said)
