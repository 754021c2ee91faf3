"""The whole chain on real Ray nodes that share nothing but an object store and an MLflow server, with nodes lost.

Nodes are network namespaces with a private /tmp and /dev/shm (infra/cluster/local); what is submitted runs there.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from s3fs import S3FileSystem

from pipelines.sample_corpus import write_corpus

LOCAL = Path(__file__).parents[2] / "infra" / "cluster" / "local"
STORE = "http://10.77.0.2"
TRACKING = f"{STORE}:5001"
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

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


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


@pytest.fixture(scope="module")
def cluster():
    """Three nodes; the first is the head."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    state = os.environ.get("LUMOS_LOCAL_STATE") or f"/var/tmp/lumos-drills-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "LUMOS_LOCAL_STATE", state)
        control("up", 3, "--store")
        try:
            lines = Path(ENVIRONMENT["LUMOS_LOCAL_STATE"], "env").read_text().splitlines()
            words = [word for line in lines for word in line.removeprefix("export ").split()]
            yield Cluster(dict(word.split("=", 1) for word in words))
        finally:
            control("down")


@pytest.fixture(scope="module")
def corpus(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 0, 24)
    cluster.store.put(f"{folder}/", "lumos/corpus/", recursive=True)
    return folder


@pytest.fixture(scope="module")
def dataset(cluster, corpus):
    cluster.run("curate", "demo", "source.path=s3://lumos/corpus", "dataset=s3://lumos/dataset")
    return "s3://lumos/dataset"


@pytest.fixture(scope="module")
def here(corpus, tmp_path_factory):
    """The same on this machine alone."""
    folder = tmp_path_factory.mktemp("here")
    for command in (
        ["curate", "demo", f"source.path={corpus}", f"dataset={folder}/dataset"],
        ["train", "demo", f"data.dataset={folder}/dataset", f"output={folder}/run", *TRAINING],
    ):
        done = subprocess.run(["lumos", *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
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


def test_a_snapshot_is_that_of_one_machine(cluster, dataset, here):
    (there,) = cluster.store.glob("lumos/dataset/snapshots/*/manifest.json")
    (alone,) = here.glob("dataset/snapshots/*/manifest.json")
    assert shards(cluster.store.cat_file(there)) == shards(alone.read_bytes())


def test_a_path_of_one_machine_is_refused(cluster, dataset):
    command = ["train", "demo", f"data.dataset={dataset}", "output=/tmp/run", f"tracking.uri={TRACKING}", *TRAINING]
    with cluster.submit(*command, node=2) as job:
        said, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "output = /tmp/run: a path of one machine, and this cluster has 3. Name s3:// URIs; or set " in said
    with cluster.submit(*command) as job:
        said, _ = job.communicate(timeout=120)
    assert job.returncode == 2, said
    assert "/tmp/run" in said
    assert "s3://" in said


def test_a_training_outlives_a_worker_s_node_and_is_that_of_one_machine(cluster, dataset, here):
    output = "s3://lumos/runs/worker-lost"
    job = cluster.submit(
        "train", "demo", f"data.dataset={dataset}", f"output={output}", f"tracking.uri={TRACKING}", *TRAINING
    )
    with job:
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint")
        nodes = cluster.nodes_of("RayTrainWorker")
        assert len(nodes) == 2, "the workers were to be on different nodes"
        lost = max(nodes)
        control("node", lost, "kill")
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    control("node", lost, "start")
    expected = losses((here / "run" / "metrics.jsonl").read_text())
    record = cluster.store.cat_file(f"{output}/metrics.jsonl").decode()
    assert losses(record) == pytest.approx(expected, abs=1e-6)
    starts = json.loads(cluster.store.cat_file(f"{output}/run.json"))["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]
    assert tracked("worker-lost") == [(step, loss) for step, loss in enumerate(losses(record), 1)]


def test_a_training_outlives_its_driver_s_node(cluster, dataset, here):
    output = "s3://lumos/runs/driver-lost"
    command = [
        "train", "demo", f"data.dataset={dataset}", f"output={output}", f"tracking.uri={TRACKING}", *TRAINING
    ]  # fmt: skip
    with cluster.submit(*command, node=3) as job:
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint")
        control("node", 3, "kill")
        job.kill()  # Ray's command goes on listening to a log that has no node any more
    control("node", 3, "start")
    said = cluster.run(*command)  # as KubeRay does; it waits for the other's last sign of life to be old
    assert "continuing from the checkpoint of step" in said
    record = cluster.store.cat_file(f"{output}/metrics.jsonl").decode()
    assert losses(record) == pytest.approx(losses((here / "run" / "metrics.jsonl").read_text()), abs=1e-6)
    assert tracked("driver-lost") == [(step, loss) for step, loss in enumerate(losses(record), 1)]


def test_videos_are_made_once_though_a_replica_s_node_is_lost_and_evaluated(cluster, dataset):
    model = "s3://lumos/runs/worker-lost/export"
    prompts = "A large red square moves left in front of a white background.\nA small blue bar moves up."
    cluster.store.pipe_file("lumos/prompts.txt", prompts.encode())
    arguments = [f"model={model}", "prompts=s3://lumos/prompts.txt", "seeds_per_prompt=8", "batch.max_size=2"]
    arguments += ["replicas.num_cpus=1.5", "replicas.num_replicas=2"]
    cluster.run("generate", "demo", *arguments, "output=s3://lumos/videos/whole")
    with cluster.submit("generate", "demo", *arguments, "output=s3://lumos/videos/lost") as job:
        wait_for(lambda: cluster.videos("lumos/videos/lost"), "a first video")
        lost = max(cluster.nodes_of("ServeReplica"))
        assert lost > 1, "replicas were to be on different nodes"
        control("node", lost, "kill")
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    control("node", lost, "start")
    whole = cluster.videos("lumos/videos/whole")
    assert len(whole) == 16
    assert cluster.videos("lumos/videos/lost") == whole
    said = cluster.run("evaluate", "s3://lumos/videos/whole", "--out", "s3://lumos/results")
    assert "recorded on run" in said
    assert cluster.store.exists("lumos/results/gallery.html")
