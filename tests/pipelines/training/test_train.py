"""Real runs: Ray Train, DeepSpeed and MLflow, two workers on two CPUs, killed in various ways."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from lumos.checkpoint import load_checkpoint
from lumos.decoder import Decoder
from lumos.losses import LossModule
from lumos.tokenizers.text import TextTokenizer
from pipelines.config import config_to_yaml
from pipelines.errors import JobError, UserError
from pipelines.streams import torch_stream
from pipelines.training.checkpoints import find_checkpoints
from pipelines.training.config import CheckpointConfig, OptimizerConfig, ValidationConfig
from pipelines.training.export import export, locate
from pipelines.training.ingest import StepLoader, pack, unpack
from pipelines.training.prepare import prepare
from pipelines.training.record import StepRecord
from pipelines.training.run import TrainResult, train
from tests.cluster import own_cluster
from tests.pipelines.training.kills import kill_a_worker, kill_driver, when
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot

pytestmark = pytest.mark.timeout(600)  # on a busy machine each start of Ray Train's processes takes a minute


def spoil_codes(dataset: Path) -> None:
    """Take a code from each row of one shard, and let the manifest say that it is so."""
    (manifest,) = dataset.glob("snapshots/*/manifest.json")
    raw = json.loads(manifest.read_text())
    shard = raw["buckets"][0]["shards"][0]
    file = manifest.parent / shard["path"]
    table = pq.read_table(file)
    short = pa.array([codes[:-1] for codes in table["codes"].to_pylist()], table.schema.field("codes").type)
    pq.write_table(table.set_column(table.schema.get_field_index("codes"), table.schema.field("codes"), short), file)
    shard["bytes"], shard["sha256"] = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def two_cpus():
    """A cluster with exactly as many CPUs as workers."""
    with own_cluster(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def dataset(folder):
    return write_snapshot(folder / "dataset", {(2, 4, 4): 21, (3, 4, 6): 8}, held_out={(2, 4, 4): 3, (3, 4, 6): 3})


@pytest.fixture(scope="module")
def uninterrupted(two_cpus, dataset, folder) -> TrainResult:
    return train(tiny_config(dataset, folder / "uninterrupted", validation=ValidationConfig(every=25)))


def losses(records) -> list[float]:
    return [record.loss for record in records]


def metrics_lines(output: Path) -> list[str]:
    file = output / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def check_tracked_once(result: TrainResult) -> None:
    """One run, with every step once, as in ``metrics.jsonl``."""
    client = MlflowClient(result.store.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"attributes.run_name = '{result.export_dir.parent.name}'")
    assert [run.info.run_id for run in runs] == [result.run_id]
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(result.run_id, "loss")
    assert [metric.step for metric in history] == [record.step for record in result.records]
    assert [metric.value for metric in history] == losses(result.records)


def test_training_of_two_workers_on_two_cpus(uninterrupted, folder):
    records = uninterrupted.records
    assert [record.step for record in records] == list(range(1, 61))
    assert [StepRecord.from_line(line) for line in metrics_lines(folder / "uninterrupted")] == list(records)
    assert losses(records)[-1] < losses(records)[0] - 0.3
    assert all(0.6 < record.masked_share <= 1.0 for record in records)
    weights = [len(record.frame_losses) for record in records]
    assert set(weights) == {2, 3}, "one loss per latent frame of the step's bucket"
    for record in records:
        assert record.loss == pytest.approx(sum(record.frame_losses) / len(record.frame_losses), abs=0.05)
    kept = sorted(path.name.split("-")[1] for path in (folder / "uninterrupted").glob("checkpoints/*/step-*"))
    assert kept == ["00000050", "00000060"]


def test_loss_of_the_first_step_is_that_of_the_whole_batch_at_once(uninterrupted, dataset, folder):
    config = tiny_config(dataset, folder / "none", num_workers=1, micro_batch_tokens=1024)
    prepared = prepare(config)
    model = Decoder(prepared.model)
    model.init_weights(torch_stream(config.seed, "init"))
    (batch,) = next(unpack(pack([StepLoader(prepared, 0, 1).load(0)]))).micro_batches
    first = uninterrupted.records[0]
    total, sums, counts = LossModule(model, prepared.vocabulary, 0.0)(batch, len(first.frame_losses))
    loss = total / counts.sum()
    assert first.masked_tokens == counts.sum()
    assert first.loss == pytest.approx(loss.item(), abs=2e-6)
    assert list(first.frame_losses) == pytest.approx((sums / counts).tolist(), abs=5e-6)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert first.grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_held_out_rows_are_validated_every_so_many_steps_and_at_the_end(uninterrupted):
    validated = {record.step: record for record in uninterrupted.records if record.val_loss is not None}
    assert list(validated) == [25, 50, 60]
    assert len(validated[60].val_frame_losses) == 3
    assert validated[60].val_loss < validated[25].val_loss
    assert all(record.val_tokens == validated[25].val_tokens for record in validated.values())


def test_every_worker_says_how_long_the_parts_of_its_steps_take(uninterrupted, folder):
    lines = [json.loads(line) for line in (folder / "uninterrupted" / "phases.jsonl").read_text().splitlines()]
    assert {(line["rank"], line["step"]) for line in lines} == {
        (rank, step) for rank in (0, 1) for step in range(10, 61, 10)
    }
    for line in lines:
        assert {"data", "forward", "backward", "optimizer"} <= line["seconds"].keys()
    records = uninterrupted.records
    assert all({"forward", "backward", "optimizer"} <= record.phases.keys() for record in records)
    assert [record.step for record in records if record.checkpoint_seconds] == [11, 21, 31, 41, 51]
    assert {record.workers for record in records} == {2}


def test_export_is_what_generation_reads(uninterrupted):
    loaded = load_checkpoint(uninterrupted.export_dir)
    assert loaded.model.lm_head.weight.dtype == torch.float32
    assert loaded.info.train_config["steps"] == 60
    assert loaded.info.tokenizer.weights_hash == "sha256:test"
    text = TextTokenizer.load(uninterrupted.export_dir / "text_tokenizer.json")
    assert text.vocab_size == loaded.vocabulary.text_vocab_size
    assert text.hash == loaded.info.text_tokenizer_hash


def test_mlflow_has_the_run(uninterrupted):
    check_tracked_once(uninterrupted)
    client = MlflowClient(uninterrupted.store.uri)
    run = client.get_run(uninterrupted.run_id)
    wanted = {"val/loss", "perplexity", "seconds_forward", "tokens_seen", "checkpoint_seconds"}
    assert wanted <= run.data.metrics.keys()
    wanted = {"loss", "loss_frame_0", "loss_frame_1", "lr", "tokens_per_s", "step_seconds", "grad_norm", "data_wait"}
    assert wanted <= run.data.metrics.keys()
    assert run.data.params["model.num_layers"] == "2"
    assert (run.data.params["device"], run.data.params["world_size"]) == ("cpu", "2")
    models = {
        model.name: model
        for model in client.search_logged_models([run.info.experiment_id])
        if model.source_run_id == run.info.run_id
    }
    assert sorted(models) == ["step-00000050", "step-00000060"]
    assert models["step-00000060"].tags["best"] == "true"
    assert Path(models["step-00000060"].tags["uri"]).is_dir()
    assert {"git_commit", "dataset_digest"} <= run.data.tags.keys()
    assert run.data.tags["dataset_digest"].startswith(run.inputs.dataset_inputs[0].dataset.digest)
    assert {item.path for item in client.list_artifacts(uninterrupted.run_id)} == {"config.yaml", "export"}


def test_a_finished_run_is_returned_and_not_repeated(uninterrupted, dataset, folder):
    again = train(tiny_config(dataset, folder / "uninterrupted"))
    assert (again.run_id, again.records) == (uninterrupted.run_id, uninterrupted.records)
    with pytest.raises(UserError, match=r"holds another run \(seed: 0 there, 1 asked for\)"):
        train(tiny_config(dataset, folder / "uninterrupted", seed=1))


def test_resume_after_a_worker_was_killed(uninterrupted, dataset, folder):
    output, killed = folder / "worker-killed", []

    def kill() -> None:
        kill_a_worker()
        killed.append(len(metrics_lines(output)))

    killer = when(lambda: find_checkpoints(str(output / "checkpoints")), kill)
    result = train(tiny_config(dataset, output))
    killer.join(timeout=1)
    assert killed, "no worker was killed"
    assert killed[0] < 60, "killed too late to matter"
    starts = [start["step"] for start in json.loads((output / "run.json").read_text())["starts"]]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1], "it goes on from the newest checkpoint"
    assert losses(result.records) == pytest.approx(losses(uninterrupted.records), abs=1e-6)
    check_tracked_once(result)


@pytest.mark.slow
def test_resume_after_the_driver_and_a_worker_were_killed(uninterrupted, dataset, folder):
    output = folder / "killed"
    checkpoints = str(output / "checkpoints")
    kill_driver(tiny_config(dataset, output), folder / "killed.yaml", lambda: find_checkpoints(checkpoints))
    killed = [len(metrics_lines(output))]

    def kill() -> None:
        kill_a_worker()
        killed.append(len(metrics_lines(output)))

    at_start = {stored.state.step for stored in find_checkpoints(checkpoints)}
    killer = when(lambda: {stored.state.step for stored in find_checkpoints(checkpoints)} - at_start, kill)
    result = train(tiny_config(dataset, output))
    killer.join(timeout=1)
    assert len(killed) == 2, "no worker was killed"
    assert killed[0] <= killed[1] < 60, "killed too late to matter"
    starts = [start["step"] for start in json.loads((output / "run.json").read_text())["starts"]]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2], "each goes on from the newest checkpoint"
    assert losses(result.records) == pytest.approx(losses(uninterrupted.records), abs=1e-6)
    check_tracked_once(result)


@pytest.mark.slow
@pytest.mark.timeout(600)  # three starts of Ray
def test_resume_after_the_driver_was_killed_without_a_compiler(uninterrupted, dataset, folder):
    """The command itself, with neither compiler nor ninja on PATH, killed once and run again."""
    output = folder / "driver-killed"
    config = folder / "config.yaml"
    config.write_text(config_to_yaml(tiny_config(dataset, output)))
    command = [sys.executable, "-m", "jobs.train", str(config)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PATH"] = str(only_bash(folder / "bin"))
    log = folder / "driver-killed.log"
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as driver:
        try:
            when(lambda: list(output.glob("checkpoints/*/step-*")), driver.kill)
            assert driver.wait(timeout=240) == -signal.SIGKILL, log.read_text()[-3000:]
        finally:
            driver.kill()
    assert len(metrics_lines(output)) < 60
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    again = train(tiny_config(dataset, output))
    assert losses(again.records) == pytest.approx(losses(uninterrupted.records), abs=1e-6)
    check_tracked_once(again)
    assert len(list(output.glob("checkpoints/*/step-*"))) == 2


def only_bash(folder: Path) -> Path:
    """A folder for PATH with nothing but what Ray starts its workers with."""
    folder.mkdir()
    (folder / "bash").symlink_to(shutil.which("bash"))
    return folder


@pytest.mark.slow
def test_world_size_and_zero_stage_do_not_change_the_loss(uninterrupted, dataset, folder):
    one = train(tiny_config(dataset, folder / "one", num_workers=1, micro_batch_tokens=512, deepspeed="zero3"))
    assert losses(one.records)[:12] == pytest.approx(losses(uninterrupted.records)[:12], abs=5e-6)
    assert losses(one.records) == pytest.approx(losses(uninterrupted.records), abs=1e-3)
    ours, theirs = (load_file(result.export_dir / "model.safetensors") for result in (one, uninterrupted))
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_bf16_follows_float32(uninterrupted, dataset, folder):
    half = train(tiny_config(dataset, folder / "bf16", precision="bf16"))
    assert losses(half.records)[:10] == pytest.approx(losses(uninterrupted.records)[:10], abs=0.05)
    assert losses(half.records) == pytest.approx(losses(uninterrupted.records), abs=0.3)
    assert load_file(half.export_dir / "model.safetensors")["lm_head.weight"].dtype == torch.float32


@pytest.mark.slow
def test_a_run_with_constant_rate_can_be_made_longer(two_cpus, dataset, folder):
    constant = OptimizerConfig(lr=3e-3, schedule="constant")
    config = tiny_config(dataset, folder / "constant", optimizer=constant, steps=12)
    short = train(config)
    longer = train(replace(config, steps=16))
    assert longer.run_id == short.run_id
    assert losses(longer.records)[:12] == losses(short.records)
    assert longer.steps == 16
    assert load_checkpoint(longer.export_dir).info.train_config["steps"] == 16


def add_unknown_key(file: Path) -> None:
    """As a newer program would have written it: a key more in each line."""
    lines = [json.loads(line) | {"z_loss": 0.5} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_resume_over_the_record_of_a_newer_program_keeps_it(two_cpus, dataset, folder):
    output = folder / "newer"
    config = tiny_config(dataset, output, num_workers=1, optimizer=OptimizerConfig(lr=3e-3), steps=3)
    first = train(config)
    parts = output / "checkpoints" / "record"
    for file in (output / "metrics.jsonl", parts / "00000001-00000003.jsonl"):
        add_unknown_key(file)
    before = metrics_lines(output)

    longer = train(replace(config, steps=5))
    assert losses(longer.records)[:3] == losses(first.records)
    lines = metrics_lines(output)
    assert lines[:3] == before
    assert [json.loads(line).get("z_loss") for line in lines] == [0.5, 0.5, 0.5, None, None]
    assert "".join(path.read_text() for path in sorted(parts.iterdir())).splitlines() == lines
    check_tracked_once(longer)
    assert longer.store.uri == f"sqlite:///{folder / 'mlruns.db'}"

    damaged = "\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n"
    (output / "metrics.jsonl").write_text(damaged)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: .*move the file away"):
        train(replace(config, steps=5))
    assert (output / "metrics.jsonl").read_text() == damaged
    (output / "metrics.jsonl").unlink()  # the remedy that the message names
    assert train(replace(config, steps=5)).records == longer.records


@pytest.mark.slow
def test_a_checkpoint_becomes_a_model_folder_and_another_run(uninterrupted, dataset, folder):
    """The export of a kept step is its weights; a fork of it goes on with another rate, and names its parent."""
    run = folder / "uninterrupted"
    with pytest.raises(UserError, match=r"the checkpoint of step 40 was not kept; .* has those of steps 50, 60"):
        locate(f"{run}@40")
    export(locate(f"{run}@60"), folder / "exported", dtype="fp32")
    export(locate(f"{run}@60"), folder / "exported-bf16", dtype="bf16")
    there = load_file(uninterrupted.export_dir / "model.safetensors")
    ours, half = (load_file(folder / name / "model.safetensors") for name in ("exported", "exported-bf16"))
    assert there.keys() == ours.keys() == half.keys()
    for key, weight in there.items():
        assert torch.equal(weight, ours[key])
        assert torch.equal(weight.bfloat16(), half[key])
    assert load_checkpoint(folder / "exported-bf16").info == load_checkpoint(uninterrupted.export_dir).info

    optimizer = replace(tiny_config(dataset, run).optimizer, lr=1e-4)
    config = tiny_config(dataset, folder / "fork", optimizer=optimizer, num_workers=1, steps=55)
    with pytest.raises(UserError, match=r"fork_from = .*was not kept"):
        train(replace(config, fork_from=f"{run}@30"))
    forked = train(replace(config, fork_from=f"{run}@50"))
    assert [record.step for record in forked.records] == list(range(1, 56))
    assert losses(forked.records)[:50] == losses(uninterrupted.records)[:50]
    assert losses(forked.records)[50] == pytest.approx(losses(uninterrupted.records)[50], abs=1e-5)
    assert losses(forked.records)[54] != losses(uninterrupted.records)[54]
    tags = MlflowClient(forked.store.uri).get_run(forked.run_id).data.tags
    assert tags["mlflow.parentRunId"] == uninterrupted.run_id


@pytest.mark.slow  # test_checkpoints.py and test_s3_checkpoints.py find the damage
def test_a_damaged_checkpoint_is_passed_over_in_the_same_command(uninterrupted, dataset, folder, capsys):
    output = folder / "damaged"
    shutil.copytree(folder / "uninterrupted", output)
    shutil.rmtree(output / "export")
    (newest,) = output.glob("checkpoints/*/step-00000060-*")
    file = max((newest / "engine").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(run | {"storage": ""}))
    result = train(tiny_config(dataset, output, progress=True))
    said = capsys.readouterr().err
    assert "warning: the checkpoint of step 60 is damaged (engine/" in said
    assert "that of step 50 is used" in said
    assert losses(result.records) == losses(uninterrupted.records)
    ours, theirs = (load_file(each.export_dir / "model.safetensors") for each in (result, uninterrupted))
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


@pytest.mark.slow  # three trainings; another number of workers is tested elsewhere too
def test_world_size_changes_between_two_commands(uninterrupted, dataset, folder):
    """2 workers, then 1, then 2: stopped by SIGTERM, which saves a checkpoint first."""
    output = folder / "resized"
    steps = []
    for workers in (2, 1):
        goal = len(metrics_lines(output)) + 8
        reached = partial(lambda goal: len(metrics_lines(output)) >= goal, goal)
        stopper = when(reached, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(JobError, match=r"stopped by SIGTERM at step \d+; its checkpoint is saved"):
            train(tiny_config(dataset, output, num_workers=workers))
        stopper.join(timeout=1)
        steps.append(len(metrics_lines(output)))
    result = train(tiny_config(dataset, output))
    assert 0 < steps[0] < steps[1] < 60
    assert losses(result.records) == pytest.approx(losses(uninterrupted.records), abs=1e-4)
    assert [record.masked_tokens for record in result.records] == [r.masked_tokens for r in uninterrupted.records]
    assert {record.workers for record in result.records} == {1, 2}
    check_tracked_once(result)


@pytest.mark.slow
def test_an_error_that_would_come_again_is_told_and_not_tried_again(two_cpus, dataset, folder, monkeypatch):
    output = folder / "bad-row"
    broken = folder / "broken"
    shutil.copytree(dataset, broken)
    spoil_codes(broken)
    with pytest.raises(JobError, match=r"training failed at rank \d, step \d+: .*It is not tried again"):
        train(tiny_config(broken, output))
    assert len(json.loads((output / "run.json").read_text())["starts"]) == 1


@pytest.mark.slow  # as the test before it, with another error
def test_an_engine_that_cannot_be_made_is_not_tried_again(two_cpus, dataset, folder):
    settings = folder / "bad.json"
    settings.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}}')
    with pytest.raises(
        JobError, match=r"training failed at rank 0, start: .*reduce_bucket_size.*It is not tried again"
    ):
        train(tiny_config(dataset, folder / "bad-engine", num_workers=1, deepspeed=str(settings)))


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_with_a_reason(two_cpus, dataset, folder):
    config = tiny_config(dataset, folder / "nan", num_workers=1, optimizer=OptimizerConfig(lr=1e30))
    with pytest.raises(
        JobError, match=r"after 4 steps in a row .*at step 5: loss nan.*lower optimizer.lr.*5 steps are"
    ):
        train(config)
    assert [json.loads(line).get("skipped", 0) for line in metrics_lines(folder / "nan")] == [0, 1, 1, 1, 1]
    run = json.loads((folder / "nan" / "run.json").read_text())
    tracked = MlflowClient(f"sqlite:///{folder / 'mlruns.db'}").get_run(run["run_id"])
    assert tracked.info.status == "FAILED"


def test_a_cluster_that_is_too_small_is_an_error(two_cpus, dataset, folder):
    with pytest.raises(UserError, match=r"num_workers = 4 workers and their loaders need 3 CPU \(there is 2\): lower"):
        train(tiny_config(dataset, folder / "wide", num_workers=4))


def workers_of(driver: int) -> list[psutil.Process]:
    """Processes of Ray Train workers below a driver's."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some twenty starts of Ray
def test_resume_under_ten_kills(uninterrupted, dataset, folder):
    """Workers and the driver in turn, each at a step drawn at random; then the curve is the uninterrupted one."""
    output, draws = folder / "ten-kills", random.Random(0)
    config = folder / "ten-kills.yaml"
    config.write_text(config_to_yaml(tiny_config(dataset, output, checkpoint=CheckpointConfig(every=3))))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.train", str(config)]
    driver: subprocess.Popen[bytes] | None = None
    for kill in range(10):
        if driver is None:
            driver = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = len(metrics_lines(output)) + draws.randint(1, 5)
        while len(metrics_lines(output)) < target:
            assert driver.poll() is None, "the driver ended by itself"
            time.sleep(0.01)
        if kill % 2:
            driver.kill()
            driver.wait()
            driver = None
        else:
            while not (workers := workers_of(driver.pid)):  # between two starts of theirs
                assert driver.poll() is None, "the driver ended by itself"
                time.sleep(0.05)
            draws.choice(workers).kill()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = train(tiny_config(dataset, output, checkpoint=CheckpointConfig(every=3)))
    assert losses(result.records) == pytest.approx(losses(uninterrupted.records), abs=1e-6)
    assert [record.masked_tokens for record in result.records] == [r.masked_tokens for r in uninterrupted.records]
    check_tracked_once(result)
