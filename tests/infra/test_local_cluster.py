"""The whole chain on real Ray nodes that share nothing but an object store and an MLflow server, with nodes lost."""

import json

import pytest

from tests.infra.local_cluster import TRACKING, TRAINING, control, losses, shards, tracked, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


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
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint", job=job)
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
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint", job=job)
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
        wait_for(lambda: cluster.videos("lumos/videos/lost"), "a first video", job=job)
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
