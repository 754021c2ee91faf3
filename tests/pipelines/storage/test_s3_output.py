"""A training whose output is in S3: what its driver keeps there, and who goes on from it."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from pipelines.config import config_to_yaml
from pipelines.errors import JobError, UserError
from pipelines.generation.config import GenerateConfig
from pipelines.generation.model import read_card
from pipelines.storage.lock import dataset_lock
from pipelines.storage.store import S3Store
from pipelines.training.config import CheckpointConfig, TrackingConfig
from pipelines.training.mirror import Mirror
from pipelines.training.output import Output
from pipelines.training.run import train
from tests.lumos.models import save_tiny_folder
from tests.pipelines.training.runs import step_record, tiny_config, wait_until
from tests.pipelines.training.snapshots import write_snapshot


def lines(*steps: int) -> str:
    return "".join(step_record(step).to_line() + "\n" for step in steps)


def record_of(mirror: Mirror) -> list[int]:
    return [json.loads(line)["step"] for line in (mirror.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_record_is_whole_wherever_the_driver_died(bucket, direct):
    uri = f"{bucket}/run"
    first = Mirror(uri)
    record = first.folder / "metrics.jsonl"
    record.write_text(lines(1, 2))
    first.push()
    for step in (3, 4):
        with record.open("a") as file:
            file.write(lines(step) + '{"step": 9')  # a line that is being written
        first.keep_record()
        record.write_text(lines(*range(1, step + 1)))
    first.keep_record()  # nothing new
    second = Mirror(uri)
    second.pull(samples_after=0)
    assert record_of(second) == [1, 2, 3, 4]
    second.push()  # the tail is older than the whole now
    (second.folder / "metrics.jsonl").write_text(lines(1, 2, 3, 4, 5))
    second.keep_record()
    third = Mirror(uri)
    third.pull(samples_after=0)
    assert record_of(third) == [1, 2, 3, 4, 5]
    assert not (third.folder / "metrics.tail.jsonl").exists()
    folder = third.folder
    del third
    gc.collect()
    assert not folder.exists()


def test_only_new_samples_are_brought_and_a_model_counts_when_it_is_whole(bucket, direct, proxy):
    uri = f"{bucket}/run"
    first = Mirror(uri)
    for step in (10, 20):
        (first.folder / f"samples/step-{step:08d}").mkdir(parents=True)
        (first.folder / f"samples/step-{step:08d}/samples.json").write_text("{}")
    (first.folder / "export").mkdir()
    for name in ("config.json", "model.safetensors"):
        (first.folder / "export" / name).write_text("old")
    (first.folder / ".partial").touch()
    first.push()
    names = {path.removeprefix(uri.removeprefix("s3://")) for path in direct.find(uri)}
    assert "/export/config.json" in names
    assert not any(".partial" in name for name in names)
    second = Mirror(uri)
    second.pull(samples_after=10)
    assert [path.name for path in (second.folder / "samples").iterdir()] == ["step-00000020"]
    (first.folder / "export" / "model.safetensors").write_text("new weights, of the same config")
    proxy.paths.clear()
    first.push()
    changes = [path.split()[0] + " " + path.split("/")[-2].split("?")[0].split()[0] for path in proxy.paths]
    written = [change for change in changes if change.startswith(("PUT", "POST", "DELETE"))]
    assert [name.split()[1] for name in written if name.startswith("PUT")] == ["model.safetensors", "config.json"]
    assert written[0].startswith(("DELETE", "POST")), "the old mark goes before the new weights come"
    third = Mirror(uri)  # that of the same command, given again
    shutil.copytree(first.folder / "export", third.folder / "export")
    proxy.paths.clear()
    third.push()
    assert not [path for path in proxy.paths if path.startswith(("PUT", "POST", "DELETE"))]


def test_a_long_record_is_not_held_in_memory(server, bucket, direct, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")  # the proxy is a thread of this process
    S3Store.clear_instance_cache()
    first = Mirror(f"{bucket}/run")
    with (first.folder / "metrics.jsonl").open("wb") as file:
        file.writelines(b"x" * (1 << 20) + b"\n" for _ in range(40))
        file.write(b"a line that is being written")
    tracemalloc.start()
    try:
        first.push()
        second = Mirror(f"{bucket}/run")
        second.pull(samples_after=0)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
    assert (second.folder / "metrics.jsonl").stat().st_size == 40 * ((1 << 20) + 1)


def test_a_driver_whose_place_was_taken_writes_nothing_more(bucket, direct):
    uri = f"{bucket}/run"
    mirror = Mirror(uri)
    (mirror.folder / "run.json").write_text("{}")
    with pytest.raises(JobError, match="took"), dataset_lock(uri, name="output"):  # noqa: PT012
        mirror.put("run.json")
        direct.pipe_file(f"{uri}/.lock", json.dumps({"pid": 1, "host": "other", "token": "x"}).encode())
        from pipelines.storage import lock

        lock._held[uri]._renew()  # as its thread does within 15 s
        (mirror.folder / "run.json").write_text('{"late": 1}')
        mirror.put("run.json")
    assert direct.cat_file(f"{uri}/run.json") == b"{}"


def test_what_an_output_in_s3_needs_is_said_first(bucket, tmp_path):
    config = tiny_config(tmp_path / "dataset", tmp_path / "out")
    with pytest.raises(UserError, match=r"output = s3://.*/run is in a store, .* set tracking.uri to a server"):
        Output(replace(config, output=f"{bucket}/run"), snapshot_digest="a" * 64)
    tracked = replace(config, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db"))
    with pytest.raises(UserError, match=r"gs://bucket/run is neither a local folder nor s3://"):
        Output(replace(tracked, output="gs://bucket/run"), snapshot_digest="a" * 64)
    with pytest.raises(UserError, match=r"create the bucket 'not-there'"):
        Output(replace(tracked, output="s3://not-there/run"), snapshot_digest="a" * 64)
    there = replace(tracked, output=f"{bucket}/run")
    Output(there, snapshot_digest="a" * 64).begin(there)
    assert Output(replace(there, progress=True), snapshot_digest="a" * 64).begun
    with pytest.raises(UserError, match=r"s3://.*/run holds another run \(seed: 0 there, 1 asked for\)"):
        Output(replace(there, seed=1), snapshot_digest="a" * 64)


def test_a_model_in_s3_is_fetched_once_and_known_by_its_content(bucket, direct, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "cache"))
    save_tiny_folder(tmp_path / "export")
    uri = f"{bucket}/runs/one/export"
    direct.put(str(tmp_path / "export"), uri, recursive=True)
    card = read_card(GenerateConfig(model=f"{uri}/", prompts=("a",), output=str(tmp_path / "videos")))
    assert card.folder.name == "one"
    proxy.paths.clear()
    assert card.folder_here().path == card.folder.path
    assert not any("safetensors" in path for path in proxy.paths if path.startswith("GET")), "it is here already"
    with ThreadPoolExecutor(4) as pool:  # on a machine that has it not, by four replicas at once
        monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "other"))
        found = set(pool.map(lambda _: card.folder_here().path, range(4)))
    assert len(found) == 1
    assert sum(" /" in path and "model.safetensors" in path for path in proxy.paths if path.startswith("GET")) == 1
    weights = f"{uri}/model.safetensors"
    direct.pipe_file(weights, direct.cat_file(weights)[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match=r"s3://.*/one/export/ are not those that this run began with"):
        card.folder_here()
    direct.pipe_file(weights, direct.cat_file(weights)[:-4])
    with pytest.raises(UserError, match=r"s3://.*/one/export.*model.safetensors"):
        read_card(card.config)
    direct.rm_file(f"{uri}/config.json")
    with pytest.raises(UserError, match=r"model: s3://.*/one/export/ has no config.json: .* being written has it last"):
        read_card(card.config)


@pytest.mark.slow
@pytest.mark.timeout(600)  # three starts of Ray
def test_a_driver_killed_with_its_machine_is_followed_by_another(ray, proxy, direct, bucket, tmp_path):
    """Nothing of the first driver's machine is left but S3 and MLflow; then its model is read from there."""
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13})
    local = train(tiny_config(dataset, tmp_path / "local", steps=24, checkpoint=CheckpointConfig(every=4)))
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db", flush_seconds=0.1)
    config = tiny_config(
        dataset, f"{bucket}/runs/one", steps=24, checkpoint=CheckpointConfig(every=4), tracking=tracking
    )
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.train", str(tmp_path / "config.yaml")]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as driver:
        try:
            wait_until(lambda: any("/step-00000008-" in path for path in direct.find(bucket)))
            driver.kill()
            assert driver.wait(timeout=60) == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
        finally:
            driver.kill()
    result = train(config)  # after it has waited for the minute in which the other might have lived
    assert [r.loss for r in result.records] == pytest.approx([r.loss for r in local.records], abs=1e-6)
    client = MlflowClient(tracking.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, 25))
    assert result.export == f"{bucket}/runs/one/export"
    assert {name.rsplit("/", 1)[1] for name in direct.find(result.export)} >= {"config.json", "model.safetensors"}
