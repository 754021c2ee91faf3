"""A cluster of several real Ray nodes on this machine (infra/cluster/local), as the drills use it.

Nodes are network namespaces with a private /tmp and /dev/shm; they share nothing but an object store and an MLflow
server. What is submitted runs there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from s3fs import S3FileSystem

LOCAL = Path(__file__).parents[2] / "infra" / "cluster" / "local"
STORE = "http://10.77.0.2"
TRACKING = f"{STORE}:5001"
SERVE_TOKEN = "planted-2f7c1be04d"  # in the environment of every node; must stand in no log and no artifact
TRAINING = [
    "steps=30",
    "optimizer.warmup_steps=2",
    "checkpoint.every=4",
    "validation.every=0",
    "precision=fp32",
    "global_batch=8",
    "model.num_layers=2",
    "resources.cpus_per_worker=1.5",  # of a node's 2: each worker has one for itself
]


def missing() -> str:
    """Why there can be no such nodes here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return "several nodes on one machine need Linux, root and iproute2"
    if any(str(place).startswith("/tmp/") for place in (sys.prefix, LOCAL)):
        return "nodes have a /tmp of their own, and the environment or the checkout lies in /tmp"
    tried = subprocess.run(["ip", "netns", "add", "lumos-try"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "lumos-try"], check=True)
    return ""


def control(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [LOCAL / script, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
ENVIRONMENT |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(LOCAL.parents[2])}


class Cluster:
    """What a person does with the cluster from this machine."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = ENVIRONMENT | env
        self.store = S3FileSystem(
            key="local",
            secret="local-secret",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def submit(self, *command: object, node: int | None = None) -> "subprocess.Popen[str]":
        """A command of `lumos` as a job of the cluster, its log as this process's output; its driver on the head.

        On another node, as KubeRay may put it, by Ray's own command.
        """
        line = ["lumos", "submit", *map(str, command)]
        if node is not None:
            variables = json.dumps({"env_vars": {"PYTHONPATH": str(LOCAL.parents[2])}})
            resources = json.dumps({f"node{node}": 1})
            line = ["ray", "job", "submit", "--runtime-env-json", variables, "--entrypoint-resources", resources]
            line += ["--", "lumos", *map(str, command)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(line, env=self.env, cwd="/", **pipes)

    def run(self, *command: object, **options: Any) -> str:
        with self.submit(*command, **options) as job:
            said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
        return said

    def videos(self, folder: str) -> dict[str, bytes]:
        """Those of a folder, by name."""
        return {path.rsplit("/", 1)[1]: self.store.cat_file(path) for path in self.store.glob(f"{folder}/*.mp4")}

    def nodes_of(self, title: str) -> set[int]:
        """The nodes on which there are processes with that in their title."""
        found = set()
        for place in Path("/var/run/netns").glob("lumos-[0-9]*"):
            pids = subprocess.run(["ip", "netns", "pids", place.name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                try:
                    name = Path(f"/proc/{pid}/cmdline").read_text()
                except OSError:
                    continue
                if title in name:
                    found.add(int(place.name.removeprefix("lumos-")))
        return found


@contextmanager
def nodes(count: int) -> Iterator[Cluster]:
    """A cluster of so many nodes and a store; the first is the head. Skips where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    state = os.environ.get("LUMOS_LOCAL_STATE") or f"/var/tmp/lumos-drills-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "LUMOS_LOCAL_STATE", state)
        control("up", count, "--store", "--env", f"LUMOS_SERVE_TOKEN={SERVE_TOKEN}")
        try:
            lines = Path(state, "env").read_text().splitlines()
            words = [word for line in lines for word in line.removeprefix("export ").split()]
            env = dict(word.split("=", 1) for word in words)
            for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
                patch.setenv(name, env[name])
            yield Cluster(env)
        finally:
            control("down")


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = 240, job: "subprocess.Popen[str] | None" = None
) -> None:
    """Wait until something is so, while the job that is to bring it about runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert job is None or job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < end, f"it never came to it: {what}"
        time.sleep(0.2)


def losses(record: str) -> list[float]:
    return [json.loads(line)["loss"] for line in record.splitlines()]


def tracked(name: str) -> list[tuple[int, float]]:
    """The steps that MLflow has of the one run of that name."""
    client = MlflowClient(TRACKING)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]


def shards(manifest: bytes | str) -> dict[str, str]:
    buckets = json.loads(manifest)["buckets"]
    return {shard["path"]: shard["sha256"] for bucket in buckets for shard in bucket["shards"]}
