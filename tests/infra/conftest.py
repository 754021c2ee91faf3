"""The cluster of the drills, and what several of them begin with."""

import subprocess

import pytest

from pipelines.sample_corpus import write_corpus
from tests.infra.local_cluster import ENVIRONMENT, TRAINING, nodes


@pytest.fixture(scope="session")
def cluster():
    """Three nodes."""
    with nodes(3) as running:
        yield running


@pytest.fixture(scope="session")
def corpus(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 0, 24)
    cluster.store.put(f"{folder}/", "lumos/corpus/", recursive=True)
    return folder


@pytest.fixture(scope="session")
def dataset(cluster, corpus):
    cluster.run("curate", "demo", "source.path=s3://lumos/corpus", "dataset=s3://lumos/dataset")
    return "s3://lumos/dataset"


@pytest.fixture(scope="session")
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
