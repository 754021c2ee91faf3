"""The chain on two real Ray nodes of this machine, one of them lost in training: the drills' short form.

The full forms (test_local_cluster.py, test_local_faults.py) hold what comes out against one machine's.
"""

import json

import pytest

from pipelines.sample_corpus import write_corpus
from tests.infra.local_cluster import TRACKING, TRAINING, control, losses, nodes, tracked, wait_for

# Five minutes of waiting for Ray on two cores, which the default suite has not.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 0, 12)
    with nodes(2) as cluster:
        cluster.store.put(f"{folder}/", "lumos/corpus/", recursive=True)
        cluster.store.pipe_file("lumos/prompts.txt", b"A small blue bar moves up.\nA large red square moves left.")
        yield cluster


def test_the_chain_on_two_nodes_of_which_one_is_lost_in_training(two_nodes):
    dataset, run = "s3://lumos/dataset", "s3://lumos/runs/short"
    two_nodes.run("curate", "demo", "source.path=s3://lumos/corpus", f"dataset={dataset}")
    training = ["train", "demo", f"data.dataset={dataset}", f"output={run}", f"tracking.uri={TRACKING}", *TRAINING]
    with two_nodes.submit(*training) as job:
        wait_for(lambda: two_nodes.store.exists(f"{run}/metrics.jsonl"), "a first checkpoint", job=job)
        assert two_nodes.nodes_of("RayTrainWorker") == {1, 2}
        control("node", 2, "kill")
        control("node", 2, "start")  # with one node alone the run, whose size is fixed, would wait
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    found = losses(two_nodes.store.cat_file(f"{run}/metrics.jsonl").decode())
    starts = json.loads(two_nodes.store.cat_file(f"{run}/run.json"))["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]
    assert len(found) == 30
    assert found[-1] < found[0] - 1
    assert tracked("short") == [(step, loss) for step, loss in enumerate(found, 1)]

    videos = "s3://lumos/videos"
    generation = ["generate", "demo", f"model={run}/export", "prompts=s3://lumos/prompts.txt", f"output={videos}"]
    two_nodes.run(*generation, "seeds_per_prompt=1", "replicas.num_cpus=1.5", "replicas.num_replicas=2")
    assert len(two_nodes.videos("lumos/videos")) == 2
    said = two_nodes.run("evaluate", videos, "--out", "s3://lumos/results")
    assert "recorded on run" in said
    assert two_nodes.store.exists("lumos/results/gallery.html")
