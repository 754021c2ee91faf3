"""A run of Ray Train whose checkpoints are in an object store that fails now and then."""

import json
import threading
import time

import psutil
import pytest

from pipelines.training.config import CheckpointConfig
from pipelines.training.run import train
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot


@pytest.mark.slow
def test_a_run_with_checkpoints_in_a_store_goes_on_from_another_output(ray, proxy, direct, bucket, tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13})
    checkpoints = CheckpointConfig(every=2, storage=f"{bucket}/runs")
    local = train(tiny_config(dataset, tmp_path / "local", steps=4, checkpoint=CheckpointConfig(every=2)))
    proxy.share = 0.05
    first = train(tiny_config(dataset, tmp_path / "first", steps=4, checkpoint=checkpoints))
    assert [record.loss for record in first.records] == [record.loss for record in local.records]
    steps = {path.split("/")[4].split("-")[1] for path in direct.find(bucket) if "/step-" in path}
    assert steps == {"00000002", "00000004"}
    second = train(tiny_config(dataset, tmp_path / "second", steps=4, checkpoint=checkpoints))
    assert [record.loss for record in second.records] == [record.loss for record in first.records]
    assert (tmp_path / "second" / "export").is_dir()
    assert proxy.faults


@pytest.mark.slow
def test_a_run_with_checkpoints_in_a_store_resumes_after_a_kill(ray, proxy, direct, bucket, tmp_path):
    """A worker is killed while the eighth checkpoint is written; the run goes on from the one before it, or from it."""
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13})
    local = train(tiny_config(dataset, tmp_path / "local", steps=20, checkpoint=CheckpointConfig(every=2)))
    killed = []

    def kill() -> None:
        while not any("/step-00000016-" in path for path in direct.find(bucket)):
            time.sleep(0.05)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        workers[-1].kill()
        killed.append(workers[-1].pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    output = tmp_path / "killed"
    found = train(
        tiny_config(dataset, output, steps=20, checkpoint=CheckpointConfig(every=2, storage=f"{bucket}/runs"))
    )
    killer.join(timeout=1)
    assert killed
    assert [record.loss for record in found.records] == pytest.approx([r.loss for r in local.records], abs=1e-6)
    starts = json.loads((output / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 14
