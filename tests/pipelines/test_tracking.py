import pytest
from mlflow.tracking import MlflowClient

from pipelines.errors import UserError
from pipelines.tracking import MetricRow, Tracker, flatten, sqlite_uri


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tracking")


def open_tracker(folder, key="one"):
    artifacts = (folder / "artifacts").as_uri()
    return Tracker(sqlite_uri(folder), experiment="test", artifacts=artifacts, key=key, run_name="name")


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
    again.log_artifacts(file)
    again.set_tags({"git_commit": "abc"})
    again.finish()

    client = MlflowClient(sqlite_uri(folder))
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


def test_a_store_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"tracking.uri = file:///.*: cannot open experiment 'test'"):
        Tracker(f"file://{tmp_path}", experiment="test", artifacts=None, key="k", run_name=None)


def test_flatten_joins_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
