"""The cluster of the drills, and what several of them begin with."""

import os
import subprocess
from pathlib import Path

import pytest

from pipelines.sample_corpus import write_corpus
from tests.infra.local_cluster import ENVIRONMENT, SERVE_TOKEN, TRAINING, Cluster, control, missing


@pytest.fixture(scope="session")
def cluster():
    """Three nodes; the first is the head."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    state = os.environ.get("LUMOS_LOCAL_STATE") or f"/var/tmp/lumos-drills-{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "LUMOS_LOCAL_STATE", state)
        control("up", 3, "--store", "--env", f"LUMOS_SERVE_TOKEN={SERVE_TOKEN}")
        try:
            lines = Path(ENVIRONMENT["LUMOS_LOCAL_STATE"], "env").read_text().splitlines()
            words = [word for line in lines for word in line.removeprefix("export ").split()]
            env = dict(word.split("=", 1) for word in words)
            for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
                patch.setenv(name, env[name])
            yield Cluster(env)
        finally:
            control("down")


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
