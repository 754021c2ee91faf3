"""Training on nodes that go and come: real Ray nodes, as processes of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipelines.config import config_to_yaml
from pipelines.training.checkpoints import find_checkpoints
from pipelines.training.config import CheckpointConfig, OptimizerConfig, ResourceConfig, TrackingConfig
from pipelines.training.record import StepRecord
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot

# A worker and its loader fill a node, so that there is one worker on each.
_NODE_CPUS = 2
_RESOURCES = ResourceConfig(cpus_per_worker=1.5, cpus_per_loader=0.5, threads_per_worker=1)
_COMPARED = 200  # steps


@pytest.fixture
def nodes():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": _NODE_CPUS})
    yield cluster
    cluster.shutdown()


def started(dataset: Path, output: Path, nodes: Cluster, *, every: int = 50, **changes: Any) -> subprocess.Popen[str]:
    config = tiny_config(
        dataset,
        output,
        resources=_RESOURCES,
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant", warmup_steps=0, clip_norm=1.0),
        tracking=TrackingConfig(flush_seconds=5.0, log_every=100),
        checkpoint=CheckpointConfig(every=every, storage=storage(output)),
        **changes,
    )
    file = output.with_suffix(".yaml")
    file.write_text(config_to_yaml(config))
    # Ray sets RAY_AUTH_MODE in a process that began a cluster, and what that process begins later asks for its token.
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or "AUTH" in name}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(file)],
        env=env | {"RAY_ADDRESS": nodes.address},
        stderr=subprocess.PIPE,
        text=True,
    )


def storage(output: Path) -> str:
    return str(output.parent / f"{output.name}-storage")


def recorded(output: Path) -> list[StepRecord]:
    file = output / "metrics.jsonl"
    return [StepRecord.from_line(line) for line in file.read_text().splitlines()] if file.exists() else []


def await_steps(driver: subprocess.Popen[str], output: Path, are_there: Callable[[list[StepRecord]], bool]) -> None:
    while not are_there(recorded(output)):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_is_lost_and_another_comes(nodes, tmp_path):
    """One worker goes on from the last checkpoint; two do once there is room; rows and curve stay the same."""
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 21, (3, 4, 6): 8})
    output = tmp_path / "elastic"
    second = nodes.add_node(num_cpus=_NODE_CPUS)
    driver = started(dataset, output, nodes, steps=100_000, min_workers=1)
    await_steps(driver, output, lambda records: len(records) >= _COMPARED // 2)
    nodes.remove_node(second, allow_graceful=False)
    await_steps(driver, output, lambda records: len(records) >= _COMPARED and records[-1].workers == 1)
    nodes.add_node(num_cpus=_NODE_CPUS)
    await_steps(driver, output, lambda records: records[-1].workers == 2)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=120) == 1
    assert "its checkpoint is saved" in driver.stderr.read()
    records = recorded(output)
    assert [record.step for record in records] == list(range(1, len(records) + 1))
    assert [workers for workers, _ in groupby(record.workers for record in records)] == [2, 1, 2]

    whole = tmp_path / "whole"
    driver = started(dataset, whole, nodes, steps=_COMPARED)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    expected = recorded(whole)
    assert [r.masked_tokens for r in records[:_COMPARED]] == [r.masked_tokens for r in expected]
    assert [r.loss for r in records[:_COMPARED]] == pytest.approx([r.loss for r in expected], abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_about_to_be_taken_away_is_saved_for(nodes, tmp_path):
    """As a cloud reclaims one: told before. The run loses no step that it had made when it was told."""
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 21, (3, 4, 6): 8})
    output = tmp_path / "preempted"
    second = nodes.add_node(num_cpus=_NODE_CPUS)
    driver = started(dataset, output, nodes, steps=100_000, min_workers=1, every=100_000)
    await_steps(driver, output, lambda records: len(records) >= 10 and records[-1].workers == 2)
    told = len(recorded(output))
    drain = "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message reclaimed"
    ending = f"--deadline-remaining-seconds 60 --address {nodes.address} --node-id {second.node_id}"
    subprocess.run([*drain.split(), *ending.split()], check=True, timeout=60)
    kept = json.loads((output / "run.json").read_text())["storage"]
    await_steps(driver, output, lambda _: find_checkpoints(kept))
    (saved,) = (stored.state.step for stored in find_checkpoints(kept))
    assert saved > told
    nodes.remove_node(second, allow_graceful=False)
    await_steps(driver, output, lambda records: records[-1].workers == 1)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=120) == 1
    records = recorded(output)
    assert [record.step for record in records] == list(range(1, len(records) + 1))
    # Steps made after that save, before the node went, are recorded already and are computed once more.
    starts = json.loads((output / "run.json").read_text())["starts"]
    assert [(start["workers"], start["step"]) for start in starts] == [(2, 0), (1, saved)]
    assert next(record.step for record in records if record.workers == 1) > saved
