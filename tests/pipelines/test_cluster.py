import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from pipelines import cluster
from pipelines.cluster import Waiting, connect, held_by_others, joining, lacking
from pipelines.config import ClusterConfig
from pipelines.errors import JobError, UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def test_an_existing_connection_is_used_and_left_open(ray_cluster):
    before = ray.get_runtime_context().get_node_id()
    with connect(num_cpus=99):
        assert ray.get_runtime_context().get_node_id() == before
        assert ray.cluster_resources()["CPU"] == 6
    assert ray.is_initialized()


def test_what_a_cluster_lacks_is_told_with_what_there_is(ray_cluster):
    assert lacking([{"CPU": 2.0, "GPU": 0.0}] * 3) == ""
    assert lacking([{"CPU": 2.0}] * 3 + [{"CPU": 0.5}]) == "6.5 CPU (there is 6)"
    assert lacking([{"CPU": 7.0, "GPU": 1.0}]) == "7 CPU (there is 6), 1 GPU (there is 0)"


def test_what_is_waited_for_is_said_while_others_hold_it(ray_cluster, monkeypatch):
    said: list[str] = []
    processes = [{"CPU": 1.5}] * 2
    held = placement_group([{"CPU": 5}])
    ray.get(held.ready(), timeout=60)
    with Waiting(lambda: held_by_others(processes), said.append, first_s=0.1) as waiting:
        time.sleep(0.5)
        assert said == [], "nothing waits"
        wanted = placement_group([{"CPU": 1.5}] * 2)
        for _ in range(200):
            if said:
                break
            time.sleep(0.1)
        assert said[0].startswith("waiting for 3 CPU (1 free of 6), for ")
        assert not waiting.is_over
        remove_placement_group(held)
        ray.get(wanted.ready(), timeout=60)
        time.sleep(0.5)
        waiting.over()
        number = len(said)
        time.sleep(1)
        assert len(said) == number
        assert waiting.is_over
        processes = [{"CPU": 3.0}] * 2
        again = placement_group([{"CPU": 5}])  # as after the loss of a node
        for _ in range(200):
            if len(said) > number:
                break
            time.sleep(0.1)
        assert said[-1].startswith("waiting for 6 CPU (3 free of 6), for ")
        assert not waiting.is_over
    context = SimpleNamespace(get_job_id=lambda: "02000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert held_by_others([{"CPU": 3}] * 2) == "", "what waits is another job's"
    monkeypatch.undo()
    for group in (again, wanted):
        remove_placement_group(group)


def test_a_process_must_fit_on_one_node(monkeypatch):
    nodes = [{"Alive": alive, "Resources": {"CPU": cpus}} for cpus, alive in ((4.0, True), (3.0, True), (16.0, False))]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert lacking([{"CPU": 4.0}, {"CPU": 3.0}]) == ""
    assert lacking([{"CPU": 5.0}]) == "5 CPU on one node (there is 4)"
    assert lacking([{"CPU": 4.0}] * 2) == "8 CPU (there is 7)"


@pytest.fixture
def machines(monkeypatch):
    """A cluster that is joined; addresses of its machines, to which more can be added."""
    addresses = ["10.0.0.1"]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeManagerAddress": address} for address in addresses])
    return addresses


LOCAL = {"output": "/tmp/run", "dataset": "s3://bucket/data", "init_from": None}


def lose_rows(machines):
    with joining(LOCAL, ClusterConfig()):
        machines.append("10.0.0.2")
        raise JobError("lacks 3 rows")


def test_a_failure_is_told_to_be_that_of_a_local_path_where_a_machine_was_added(machines):
    with pytest.raises(JobError, match=r"^lacks 3 rows$"), joining(LOCAL, ClusterConfig()):
        raise JobError("lacks 3 rows")
    with pytest.raises(JobError) as failed:
        lose_rows(machines)
    assert str(failed.value).startswith("output = /tmp/run: a path of one machine, and another was added to this clus")
    assert "(lacks 3 rows). Name s3:// URIs" in str(failed.value)
    with pytest.raises(JobError, match=r"^lacks 3 rows$"), joining(LOCAL, ClusterConfig(shared_paths=True)):
        raise JobError("lacks 3 rows")


def test_local_paths_are_refused_where_machines_are_to_be_added(machines):
    with pytest.raises(UserError, match=r"cluster\.autoscaling says that more come"):
        joining(LOCAL, ClusterConfig(autoscaling=True)).__enter__()
    with joining({"output": "s3://bucket/run"}, ClusterConfig(autoscaling=True)):
        pass


def test_cpus_are_counted_before_a_cluster_is_started_here(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "usable_cores", lambda: 2)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert lacking([{"CPU": 3.0, "GPU": 1.0}] * 2) == "", "how many GPUs there are is Ray's to say"
    waiting = "(there is 6: 2 cores, and 4 for processes that mostly wait)"
    assert lacking([{"CPU": 34.0}] * 2) == f"68 CPU {waiting}"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert lacking([{"CPU": 34.0}] * 2) == ""


def test_a_local_cluster_is_started_quietly_with_spare_cpus_and_stopped(tmp_path):
    code = (
        "import os, sys\n"
        "from pipelines.cluster import connect\n"
        "from pipelines.data.stage.run import run_stage\n"
        "from tests.pipelines.data.stage.test_run import inputs, stage\n"
        "import ray\n"
        "with connect():\n"
        "    assert run_stage(stage(stateful=True), inputs(range(4)), dataset=sys.argv[1]) == 4\n"
        "    cpus, processes = ray.cluster_resources()['CPU'], ray.nodes()\n"
        "    assert cpus >= len(os.sched_getaffinity(0)) + 2, cpus\n"
        "    assert len(processes) == 1\n"
        "assert not ray.is_initialized()\n"
    )
    env = {**os.environ, "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert "Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL" in line


def test_a_ray_that_does_not_start_is_told_in_a_line(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup. This\ncould happen because ...")

    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(JobError) as failed, connect():
        pass
    assert "\n" not in str(failed.value)
    assert str(failed.value).startswith("Ray could not start on this machine (Exception: The current node timed out")
    assert str(failed.value).endswith("then the same command continues")


def test_the_cluster_of_ray_address_is_joined_and_left_running(ray_cluster):
    address = ray.get_runtime_context().gcs_address
    code = (
        "import ray\n"
        "from pipelines.cluster import connect\n"
        "with connect(num_cpus=99):\n"
        "    print(ray.get_runtime_context().gcs_address, ray.cluster_resources()['CPU'])\n"
    )
    env = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [address, "6.0"], done.stderr
    assert ray.cluster_resources()["CPU"] == 6
