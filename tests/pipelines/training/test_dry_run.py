"""One step of each bucket on a real cluster, and nothing left behind."""

import json
import socket
from contextlib import closing
from dataclasses import replace

import pytest
from click.testing import CliRunner

from jobs.train import command
from pipelines.config import config_to_yaml
from pipelines.errors import UserError
from pipelines.tracking import TrackingStore
from pipelines.training import dry_run as dry_run_module
from pipelines.training import run as run_module
from pipelines.training.checkpoints import ModelFile
from pipelines.training.config import EmaConfig, ResourceConfig
from pipelines.training.dry_run import dry_run, first_steps
from pipelines.training.launch import make_job
from pipelines.training.prepare import prepare
from pipelines.training.run import train
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot
from tests.pipelines.training.test_checkpoints import STEP, write_checkpoint

BUCKETS = {(2, 4, 4): 21, (3, 4, 6): 8}


def test_the_largest_bucket_is_tried_first_and_each_once(tmp_path):
    run = prepare(tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out"))
    steps = first_steps(run)
    assert len(steps) == 2
    plan = run.plan()
    assert [plan.step(step).bucket.shape for step in steps] == [(3, 4, 6), (2, 4, 4)]
    for step in steps:
        shape = plan.step(step).bucket.shape
        assert all(plan.step(before).bucket.shape != shape for before in range(step))


@pytest.mark.slow
def test_a_dry_run_tells_of_each_bucket_and_leaves_nothing(ray_cluster, tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", BUCKETS)
    # 8 workers have no room on the 6 CPUs of the cluster: training would begin with fewer.
    scale = {"num_workers": 8, "min_workers": 2, "resources": ResourceConfig(cpus_per_worker=1.0)}
    config = tiny_config(dataset, tmp_path / "runs" / "out", ema=EmaConfig(start=50), **scale)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(command, [str(file), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = done.output.splitlines()
    assert told[0].startswith("3x4x6: ")
    assert told[1].startswith("2x4x4: ")
    assert all(" tokens, loss " in line and " GB of a process" in line for line in told[:2])
    assert told[2].startswith("tried with the 2 workers of min_workers")
    assert "no validation" in told[3]
    assert sorted(tmp_path.rglob("*")) == before


def refusal(monkeypatch, config, entry):
    """What a dry run or a training is refused with, before it would ask for a cluster."""

    def connect():
        raise AssertionError("it went on to the cluster")

    for module in (dry_run_module, run_module):
        monkeypatch.setattr(module, "connect", connect)
    with pytest.raises(UserError) as refused:
        entry(config)
    return str(refused.value)


@pytest.mark.parametrize("at", ["", "@10"])
def test_a_fork_of_another_shape_is_refused_and_leaves_nothing(tmp_path, monkeypatch, at):
    config = tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "runs" / "fork")
    prepared = dry_run_module.prepare(config)
    model = ModelFile(
        config=replace(prepared.model, hidden_size=96), vocabulary=prepared.vocabulary, info=prepared.info
    )
    folder = write_checkpoint(tmp_path / "parent" / "checkpoints", f"attempt-00001/{STEP.format(1)}", 10)
    (folder / "model.json").write_text(model.to_json())
    (tmp_path / "parent" / "run.json").write_text(json.dumps({"storage": str(tmp_path / "parent" / "checkpoints")}))
    asked = replace(config, fork_from=f"{tmp_path / 'parent'}{at}")
    before = sorted(tmp_path.rglob("*"))
    said = [refusal(monkeypatch, asked, entry) for entry in (dry_run, train)]
    assert said[0] == said[1]
    assert said[0].endswith("is of another model: hidden_size = 96 there, 64 here")
    assert sorted(tmp_path.rglob("*")) == before, "nor a lock"


def test_an_output_that_cannot_be_is_refused(tmp_path, monkeypatch):
    config = tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), "/proc/lumos")
    file = tmp_path / "letter.txt"
    file.touch()
    for entry in (dry_run, train):
        said = refusal(monkeypatch, config, entry)
        assert said == "output = /proc/lumos cannot be written to (No such file or directory); name another folder"
        said = refusal(monkeypatch, replace(config, output=str(file)), entry)
        assert said == f"output = {file} is a file; name a folder"
    elsewhere = replace(config.checkpoint, storage="/proc/checkpoints")
    said = refusal(monkeypatch, replace(config, output=str(tmp_path / "out"), checkpoint=elsewhere), dry_run)
    assert said.startswith("checkpoint.storage = /proc/checkpoints/lumos-")
    assert not (tmp_path / "out").exists()


def test_a_server_of_mlflow_that_does_not_answer_is_told(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert TrackingStore(uri).silence() == ""
    assert TrackingStore(f"sqlite:///{tmp_path}/none.db").silence() == ""
    config = tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out")
    prepared = dry_run_module.prepare(replace(config, tracking=replace(config.tracking, uri=uri)))
    output = dry_run_module.Output(prepared.config, snapshot_digest=prepared.dataset_digest)
    said = dry_run_module._remarks(prepared, output)
    assert said[1].startswith(f"tracking.uri = {uri}: MLflow does not answer there (")
    assert said[1].endswith("; training would go on and send its record later")


def test_the_paths_of_one_machine_are_refused_where_a_cluster_has_several(no_cluster, tmp_path, monkeypatch):
    config = tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out")
    nodes = [{"Alive": True, "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": 9.0}} for n in (1, 2)]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    for entry in (dry_run, train):
        assert refusal(monkeypatch, config, entry).startswith(f"output = {tmp_path / 'out'}, data.dataset = ")


def test_a_dry_run_does_without_the_weights_that_a_begun_run_began_with(tmp_path, monkeypatch):
    config = tiny_config(
        write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out", init_from=str(tmp_path / "gone")
    )
    digest = dry_run_module.prepare(replace(config, init_from=None)).dataset_digest
    output = dry_run_module.Output(config, snapshot_digest=digest)
    output.begin(config)
    folder = write_checkpoint(tmp_path / "out" / "checkpoints", f"attempt-00001/{STEP.format(1)}", 10)
    (folder / "state.json").write_text(
        json.dumps({"step": 10, "num_workers": 2, "identity_hash": output.identity_hash})
    )
    jobs = []
    monkeypatch.setattr(dry_run_module, "connect", lambda: 1 / 0)
    monkeypatch.setattr(dry_run_module, "make_job", lambda *args, **options: jobs.append(make_job(*args, **options)))
    with pytest.raises(ZeroDivisionError):
        dry_run(config)
    assert jobs[0].run.config.init_from is None


def test_too_few_cpus_are_told_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    config = tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out")
    config = replace(config, resources=ResourceConfig(cpus_per_worker=1000.0))
    for entry in (dry_run, train):
        said = refusal(monkeypatch, config, entry)
        assert "loaders need 2000.5 CPU (there is " in said
        assert said.endswith("resources.cpus_per_worker or resources.cpus_per_loader")
    assert not (tmp_path / "out" / "run.json").exists()
