"""What the driver does around the workers, without them."""

import json
import signal
from dataclasses import asdict, replace

import pytest
from mlflow.tracking import MlflowClient

from pipelines.errors import JobError, UserError
from pipelines.tracking import Tracker, TrackingStore
from pipelines.training import run as run_module
from pipelines.training.checkpoints import LoopState, StoredCheckpoint
from pipelines.training.config import SamplesConfig
from pipelines.training.launch import interruptible, make_job, saved_on_sigterm
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.progress import Progress
from pipelines.training.record import History
from pipelines.training.resume import Beginning
from pipelines.training.run import train
from pipelines.training.sample import Sampler
from pipelines.training.sender import Sender
from tests.pipelines.training.runs import step_record, tiny_config
from tests.pipelines.training.snapshots import write_snapshot
from tests.pipelines.training.test_checkpoints import STEP, write_checkpoint


def test_gpus_that_are_not_there_are_told_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 20}), tmp_path / "out")
    with pytest.raises(UserError, match=r"need 2 GPU \(there is 0\).*set resources.device=cpu"):
        train(replace(config, num_workers=2, resources=replace(config.resources, device="gpu")))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_an_interrupt_of_the_workers_is_one_of_the_driver():
    before = signal.getsignal(signal.SIGINT)

    def interrupted_by_ray():
        with interruptible():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray Train sets a handler, which stays, and exits with 0
            raise SystemExit(0)

    with pytest.raises(KeyboardInterrupt):
        interrupted_by_ray()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_sigterm_before_workers_are_at_work_is_an_interrupt():
    """There is nothing to save, and they may wait for hours for room on the cluster."""
    progress = Progress(60, done=0, enabled=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), saved_on_sigterm(None, progress, lambda: False):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def open_run(config) -> tuple[Output, Sender]:
    """The output of a run with its sender, as a new process has them."""
    prepared = prepare(config)
    output = Output(config, snapshot_digest=prepared.dataset_digest)
    output.begin(config)
    return output, Sender(prepared=prepared, output=output, history=History(output.metrics_file), kept=dict)


def test_what_is_kept_says_which_step_it_goes_on_from(tmp_path, monkeypatch):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    output, sender = open_run(config)
    sender.history.add([step_record(step) for step in range(1, 19)])
    kept = f"18 steps are in {output.folder}; the same command"
    assert run_module._kept(output, sender.history) == f"{kept} begins again from step 1"
    write_checkpoint(tmp_path / "out" / "checkpoints", f"attempt-00001/{STEP.format(1)}", 15)
    assert run_module._kept(output, sender.history) == f"{kept} continues from the checkpoint of step 15"

    def away(_):
        raise OSError("the store is away")

    monkeypatch.setattr(run_module, "find_checkpoints", away)
    assert run_module._kept(output, sender.history) == f"{kept} continues from the last checkpoint"


def test_workers_are_told_whole_paths(tmp_path, monkeypatch):
    """They have another working directory."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 1}}')
    prepared = prepare(replace(config, deepspeed="own.json", checkpoint=replace(config.checkpoint, scratch="scratch")))
    prepared = replace(prepared, config=replace(prepared.config, init_from="runs/base"))
    output = Output(prepared.config, snapshot_digest=prepared.dataset_digest)
    told = make_job(prepared, output, records=None, orders=None).run.config
    assert told.init_from == str(tmp_path / "runs" / "base")
    assert (told.deepspeed, told.checkpoint.scratch) == (str(tmp_path / "own.json"), str(tmp_path / "scratch"))
    state = LoopState(step=3, num_workers=2, identity_hash="x")
    beginning = Beginning(StoredCheckpoint("/runs/step-3", state), [])
    job = make_job(prepared, output, records=None, orders=None, beginning=beginning)
    assert (job.resume_from, job.run.config.init_from) == ("/runs/step-3", None), "which may be gone by now"
    prepared = replace(prepared, config=replace(config, init_from="s3://bucket/base"))
    told = make_job(prepared, output, records=None, orders=None).run.config
    assert (told.init_from, told.deepspeed, told.checkpoint.scratch) == ("s3://bucket/base", "zero1", None)


def test_another_store_gets_all_steps(tmp_path):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    output, sender = open_run(config)
    History(output.metrics_file).add([step_record(1), step_record(2)])
    sender.history = History(output.metrics_file)
    sender.end("FINISHED")
    first = output.run.run_id
    assert (output.run.sent, output.run.finished) == (2, True)
    elsewhere = replace(config, tracking=replace(config.tracking, uri=f"sqlite:///{tmp_path / 'other.db'}"))
    moved, sender = open_run(elsewhere)
    assert moved.run.run_id == first
    sender.end("FINISHED")
    assert moved.run.run_id != first
    steps = MlflowClient(moved.store.uri).get_metric_history(moved.run.run_id, "loss")
    assert [metric.step for metric in steps] == [1, 2]


def test_a_model_that_cannot_be_written_fails_the_run_and_is_told(tmp_path):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out", steps=3)
    output, _ = open_run(config)
    folder = write_checkpoint(tmp_path / "out" / "checkpoints", f"attempt-00001/{STEP.format(1)}", 3)
    state = LoopState(step=3, num_workers=2, identity_hash=output.identity_hash, exported=True)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (output.export / "of mine").mkdir(parents=True)
    with pytest.raises(JobError, match=r"export holds files that are not .*; what was done is kept: give the same com"):
        train(config)
    client = MlflowClient(output.store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("lumos").experiment_id])
    assert run.info.status == "FAILED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]


def test_a_checkpoint_is_told_on_where_the_store_of_the_output_is_away(tmp_path, monkeypatch):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    output, sender = open_run(replace(config, samples=SamplesConfig(every=10)))
    sender._models_due, offered = False, []

    def away():
        raise OSError("the store is away")

    monkeypatch.setattr(output, "push", away)
    sampler = Sampler(sender.prepared, output.samples, say=print)
    monkeypatch.setattr(sampler, "offer", lambda step, _: offered.append(step))
    said = {"event": "checkpoint", "step": 10}
    with pytest.raises(OSError, match="away"):
        run_module._hear(said, output, sender, sampler, Progress(60, done=0, enabled=False))
    assert (sender._models_due, offered) == (True, [10])


def test_two_runs_of_one_folder_stand_in_one_experiment(tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13})
    ids = set()
    for name in ("first", "second"):
        config = tiny_config(dataset, tmp_path / "runs" / name)
        output, sender = open_run(config)
        sender.end("FINISHED")
        ids.add(output.run.run_id)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlruns.db'}")
    runs = client.search_runs([client.get_experiment_by_name("lumos").experiment_id])
    assert {run.info.run_id for run in runs} == ids
    assert {run.info.run_name for run in runs} == {"first", "second"}
    for run in runs:
        assert run.info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert not list((tmp_path / "runs").glob("*/mlflow*"))


def test_a_run_with_a_store_in_its_output_goes_on_in_it(tmp_path, monkeypatch, capsys):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    output, _ = open_run(config)
    older = TrackingStore(
        f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}", (tmp_path / "out" / "mlflow-artifacts").as_uri()
    )
    begun = Tracker(older, experiment="lumos", key=output.run.key, run_name="out")
    resumed, sender = open_run(config)
    sender.end("FINISHED")
    assert resumed.run.run_id == begun.run_id
    assert not (tmp_path / "mlruns.db").exists()

    monkeypatch.setattr(run_module, "_continue", lambda *_: None)
    train(config)
    said = capsys.readouterr().err
    assert "goes on in it: mlflow ui --backend-store-uri sqlite:///" in said
    assert f"{tmp_path}/out/mlflow.db" in said
