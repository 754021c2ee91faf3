import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipelines.errors import UserError
from pipelines.tracking import (
    MetricRow,
    ModelLink,
    Tracker,
    TrackingStore,
    TrackingUnavailableError,
    check_uri,
    flatten,
)

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tracking")


def open_tracker(folder, key="one"):
    return Tracker(TrackingStore.choose(None, folder / "run"), experiment="test", key=key, run_name="name")


def test_a_run_is_resumed_by_its_key_and_holds_each_step_once(folder, tmp_path):
    rows = [MetricRow(step=step, time=1000.0 + step, values={"loss": 1.0 / step, "lr": 0.1}) for step in range(1, 601)]
    first = open_tracker(folder)
    assert not first.resumed
    first.log_params({"model": {"num_layers": 2, "rope": "mm"}, "note": "x" * 7000})
    first.log_metrics(rows[:400])
    first.log_dataset(name="v0001", digest="ab" * 32, source="/data", context="train")
    again = open_tracker(folder)
    assert (again.run_id, again.resumed) == (first.run_id, True)
    again.log_metrics(rows[300:])
    file = tmp_path / "config.yaml"
    file.write_text("a: 1\n")
    again.log_artifact(file)
    again.set_tags({"git_commit": "abc"})
    again.end("FINISHED")

    client = MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    history = client.get_metric_history(first.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1, 601))
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.num_layers"] == "2"
    assert len(run.data.params["note"]) == 6000
    assert run.data.tags["git_commit"] == "abc"
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("v0001", "ab" * 16)
    assert [artifact.path for artifact in client.list_artifacts(first.run_id)] == ["config.yaml"]


def test_another_key_is_another_run_of_the_experiment(folder):
    assert open_tracker(folder, "two").run_id != open_tracker(folder, "three").run_id


@pytest.mark.parametrize("uri", ["file:///runs", "ftp://host/runs", "runs/mlruns.db", ""])
def test_an_address_in_which_mlflow_keeps_no_runs_is_refused(uri):
    with pytest.raises(ValueError, match=f"^uri = {uri} is none in which MLflow keeps runs"):
        check_uri(uri)


@pytest.mark.parametrize("uri", ["sqlite:///mlruns.db", "postgresql+psycopg2://u@h/db", "https://h", "databricks"])
def test_an_address_that_mlflow_knows_is_taken(uri):
    check_uri(uri)


def test_a_folder_that_cannot_hold_a_store_is_an_error(tmp_path):
    (tmp_path / "mlruns.db.lock").mkdir()  # root may write into any folder, but not into a folder as a file
    with pytest.raises(UserError, match=r"tracking.uri = sqlite:///.*mlruns.db: cannot open experiment 'test'"):
        open_tracker(tmp_path)


# Started twice at once in a folder without a store.
START = """
import sys, time
from pathlib import Path
from mlflow.tracking import MlflowClient
from pipelines.tracking import MetricRow, TrackingStore, Tracker
name, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"{name}-is-ready").touch()
while len(list(folder.glob("*-is-ready"))) < 2:
    time.sleep(0.001)
tracker = Tracker(TrackingStore.choose(None, folder / name), experiment="both", key=name, run_name=name)
for step in range(40):
    tracker.log_metrics([MetricRow(step=step, time=1000.0 + step, values={"loss": float(step)})])
tracker.end("FINISHED")
"""


def test_two_runs_may_start_at_once_in_one_folder(tmp_path):
    command = [sys.executable, "-c", START]
    runs = [
        subprocess.Popen([*command, name, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for run in runs:
        _, said = run.communicate(timeout=240)
        assert run.returncode == 0, said
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    found = client.search_runs([client.get_experiment_by_name("both").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["one", "two"]
    for run in found:
        assert run.info.status == "FINISHED"
        assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == list(range(40))


def test_a_store_says_how_it_is_opened(tmp_path):
    folder = tmp_path / "my runs"
    command = f"mlflow ui --backend-store-uri 'sqlite:///{folder}/mlruns.db'"
    assert TrackingStore.choose(None, folder / "a").how_to_open == command
    assert TrackingStore.choose("http://127.0.0.1:5000", folder / "a") == TrackingStore("http://127.0.0.1:5000")
    assert TrackingStore("http://127.0.0.1:5000").how_to_open == "http://127.0.0.1:5000"


def test_a_parameter_that_changed_has_a_tag_and_none_is_an_error(tmp_path):
    first = open_tracker(tmp_path)
    first.log_params({"steps": 10, "tracking": {"uri": None}})
    again = open_tracker(tmp_path)
    again.log_params({"steps": 20, "tracking": {"uri": None}, "added": 1})
    client = MlflowClient(again.uri)
    data = client.get_run(again.run_id).data
    assert (data.params["steps"], data.params["added"]) == ("10", "1")
    assert {key: value for key, value in data.tags.items() if key.startswith("changed.")} == {"changed.steps": "20"}
    again.log_params({"steps": 10})
    assert "changed.steps" not in client.get_run(again.run_id).data.tags


def test_a_dataset_and_tags_may_be_written_again(tmp_path):
    tracker = open_tracker(tmp_path)
    for _ in range(2):
        tracker.log_dataset(name="v0001", digest="ab" * 32, source="/data", context="train")
        tracker.set_tags({"git_commit": "abc", "output": "out"})
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["v0001"]
    assert run.data.tags["output"] == "out"


def test_logged_models_are_those_of_the_kept_checkpoints_and_the_best_is_told(tmp_path):
    tracker = open_tracker(tmp_path)
    client = MlflowClient(tracker.uri)

    def link(step: int, loss: float) -> ModelLink:
        rows = (
            MetricRow(step, 1000.0 + step, {"loss": loss}),
            MetricRow(step - 1, 999.0 + step, {"val/loss": loss + 1}),
        )
        return ModelLink(step, f"s3://runs/step-{step}", rows)

    def models() -> dict[str, object]:
        home = client.get_run(tracker.run_id).info.experiment_id
        found = client.search_logged_models([home], filter_string=f"source_run_id = '{tracker.run_id}'")
        return {model.name: model for model in found}

    tracker.log_models([link(10, 1.0), link(20, 2.0)], best_by="val/loss")
    tracker.log_models([link(10, 1.0), link(20, 2.0)], best_by="val/loss")
    found = models()
    assert sorted(found) == ["step-00000010", "step-00000020"]
    assert found["step-00000010"].tags["uri"] == "s3://runs/step-10"
    assert {(m.key, m.value, m.step) for m in found["step-00000010"].metrics} == {
        ("loss", 1.0, 10),
        ("val/loss", 2.0, 9),
    }
    assert client.get_run(tracker.run_id).data.tags["best_model"] == "step-00000010"
    tracker.log_models([link(20, 2.0), link(30, 1.5)], best_by="val/loss")
    found = models()
    assert {name: model.tags["best"] for name, model in found.items()} == {
        "step-00000020": "false",
        "step-00000030": "true",
    }


def test_a_server_that_does_not_answer_is_no_mistake_of_the_user(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingUnavailableError, match=r"tracking.uri = http://127.0.0.1:9: cannot open experiment"):
        Tracker(TrackingStore("http://127.0.0.1:9"), experiment="test", key="k", run_name=None)


def test_flatten_joins_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
