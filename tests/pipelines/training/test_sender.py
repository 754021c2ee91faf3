"""What MLflow gets of a run, on real stores, without the workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
from mlflow.tracking import MlflowClient

from pipelines.errors import UserError
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.record import History
from pipelines.training.sender import Sender
from tests.pipelines.training.runs import step_record, tiny_config, wait_until
from tests.pipelines.training.snapshots import write_snapshot


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("data") / "dataset", {(2, 4, 4): 13})


def open_run(dataset, folder, *, kept=None, **tracking):
    """A new process' view of a run: its output, history and sender."""
    config = tiny_config(dataset, folder)
    config = replace(config, tracking=replace(config.tracking, **{"flush_seconds": 0.1, **tracking}))
    prepared = prepare(config)
    output = Output(config, snapshot_digest=prepared.dataset_digest)
    output.begin(config)
    history = History(output.metrics_file)
    return output, history, Sender(prepared=prepared, output=output, history=history, kept=lambda: kept or {})


def steps_of(client, run_id, name="loss"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_what_is_recorded_is_sent_while_training_goes_on(dataset, tmp_path):
    kept: dict[int, str] = {}
    output, history, sender = open_run(dataset, tmp_path / "out", kept=kept)
    with sender:
        sender.check(120)
        history.add([replace(step_record(step), clips=8, val_loss=3.0 if step == 2 else None) for step in range(1, 4)])
        wait_until(lambda: output.run.sent == 3)
        output.started(step=0, time=1000.0, device="NVIDIA H100 80GB HBM3", workers=2)
        output.started(step=2, time=1002.5, device="NVIDIA H100 80GB HBM3", workers=2)
        kept[3] = "/somewhere/step-3"
        sender.checkpointed()
        history.add([replace(step_record(4), clips=8, val_loss=2.0, val_frame_losses=(2.0,))])
        wait_until(lambda: output.run.sent == 4)
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    (export / "model.safetensors").write_bytes(b"weights")
    sender.end("FINISHED", export)

    client = MlflowClient(output.store.uri)
    run = client.get_run(output.run.run_id)
    assert (run.info.status, output.run.finished) == ("FINISHED", True)
    assert steps_of(client, run.info.run_id) == [1, 2, 3, 4]
    assert steps_of(client, run.info.run_id, "val/loss") == [2, 4], "the model's is told at the step of the validation"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "restarts")] == [(2, 1.0)]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "clips_seen")] == [8.0, 16.0, 24.0, 32.0]
    params = run.data.params
    assert params["device"] == "NVIDIA H100 80GB HBM3"
    assert (params["world_size"], params["model.num_layers"]) == ("2", "2")
    assert {"versions.lumos", "versions.torch", "versions.deepspeed", "versions.ray"} <= params.keys()
    assert run.data.tags["export"] == export.as_uri()
    assert [item.path for item in client.list_artifacts(run.info.run_id, "export")] == ["export/config.json"]
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.name, model.tags["uri"]) == ("step-00000003", "/somewhere/step-3")
    assert {(m.key, m.step, m.value) for m in model.metrics} == {("loss", 3, 1.0), ("val/loss", 2, 3.0)}


@pytest.mark.parametrize("batch", [1000, 2])
def test_every_nth_step_has_a_row_also_after_a_resume(dataset, tmp_path, monkeypatch, batch):
    monkeypatch.setattr("pipelines.training.sender._BATCH", batch)  # fewer than make a row: it goes on to the next
    output, history, sender = open_run(dataset, tmp_path / "out", log_every=3)
    history.add(replace(step_record(step), clips=8) for step in range(1, 8))
    sender.end("FAILED")
    output, history, sender = open_run(dataset, tmp_path / "out", log_every=3)
    assert output.run.sent == 7
    history.add(replace(step_record(step), clips=8) for step in range(8, 11))
    sender.end("FINISHED")
    client = MlflowClient(output.store.uri)
    assert steps_of(client, output.run.run_id) == [3, 6, 7, 9, 10]
    assert [m.value for m in client.get_metric_history(output.run.run_id, "clips_seen")] == [24, 48, 56, 72, 80]
    assert History(output.metrics_file).last_step == 10


def test_a_validation_within_a_row_does_not_divide_it_after_a_resume(dataset, tmp_path):
    output, history, sender = open_run(dataset, tmp_path / "out", log_every=3)
    history.add([replace(step_record(step, loss=step), val_loss=2.0 if step == 4 else None) for step in range(1, 5)])
    sender._send()
    assert output.run.sent == 3
    output, history, sender = open_run(dataset, tmp_path / "out", log_every=3)
    history.add([step_record(5, loss=5), step_record(6, loss=6)])
    sender.end("FINISHED")
    client = MlflowClient(output.store.uri)
    found = client.get_metric_history(output.run.run_id, "loss")
    assert [(metric.step, metric.value) for metric in found] == [(3, 2.0), (6, 5.0)]
    assert steps_of(client, output.run.run_id, "val/loss") == [4]


def test_a_fork_hangs_below_its_parent(dataset, tmp_path):
    output, _, sender = open_run(dataset, tmp_path / "out")
    output.update(fork={"from": "runs/one@20", "digest": "x", "run_id": "abc"})
    sender.end("FINISHED")
    tags = MlflowClient(output.store.uri).get_run(output.run.run_id).data.tags
    assert (tags["fork_from"], tags["mlflow.parentRunId"]) == ("runs/one@20", "abc")


def test_a_store_that_cannot_be_is_refused_before_training(dataset, tmp_path):
    (tmp_path / "file").touch()
    _, _, sender = open_run(dataset, tmp_path / "out", uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with sender, pytest.raises(UserError, match=r"tracking.uri = sqlite:.*check the address of the store"):
        sender.check(60)


def test_a_store_that_cannot_be_is_told_at_the_end_of_a_finished_run(dataset, tmp_path, caplog):
    (tmp_path / "file").touch()
    _, history, sender = open_run(dataset, tmp_path / "out", uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    history.add([step_record(1)])
    sender.end("FINISHED")
    assert "check the address of the store, or name another" in caplog.text
    assert "the next `lumos train` of this run sends it" in caplog.text


class Server:
    """A real MLflow server that can be stopped and started again at its address."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._answers)

    def _answers(self):
        try:
            return httpx.get(f"{self.uri}/health", timeout=1).status_code == 200
        except httpx.HTTPError:
            time.sleep(0.1)
            return False

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.slow
@pytest.mark.timeout(600)  # two starts of a server
def test_an_outage_at_start_middle_and_end_fails_nothing_and_nothing_is_lost(dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = Server(tmp_path)
    try:
        output, history, sender = open_run(dataset, tmp_path / "out", uri=server.uri)
        with sender:
            sender.check(60)
            history.add([step_record(1), step_record(2)])
            assert (sender.tracker, output.run.sent) == (None, 0)
            server.start()
            wait_until(lambda: any("MLflow is reached again" in said for said in caplog.messages))
            assert output.run.sent == 2
            server.stop()
            history.add([step_record(3)])
            wait_until(lambda: sum("MLflow cannot be reached" in said for said in caplog.messages) == 2)
            history.add([step_record(4)])
        sender.end("FINISHED")
        assert (output.run.sent, output.run.finished) == (2, False)
        told = [said.split(",")[0].split(";")[0] for said in caplog.messages if "MLflow" in said]
        assert told == [
            "MLflow cannot be reached",
            "MLflow is reached again",
            "MLflow cannot be reached",
            f"MLflow lacks what {output.metrics_file} holds after step 2: the next `lumos train` of this run sends it",
        ]
        server.start()
        output, history, sender = open_run(dataset, tmp_path / "out", uri=server.uri)
        sender.end("FINISHED")
        assert (output.run.sent, output.run.finished) == (4, True)
        client = MlflowClient(server.uri)
        assert steps_of(client, output.run.run_id) == [1, 2, 3, 4]
        assert client.get_run(output.run.run_id).info.status == "FINISHED"
        assert json.loads((tmp_path / "out" / "run.json").read_text())["run_id"] == output.run.run_id
    finally:
        server.stop()
