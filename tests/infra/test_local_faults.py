"""Networks that go and services that fail under the chain, on real Ray nodes; some minutes for each."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.sample_corpus import write_corpus
from tests.infra.local_cluster import (
    ENVIRONMENT,
    SERVE_TOKEN,
    TRACKING,
    TRAINING,
    Cluster,
    control,
    losses,
    shards,
    tracked,
    wait_for,
)
from tests.pipelines.storage.faults import faulty_proxy

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
HERE = "10.77.0.1"  # this machine, as nodes see it
HEAD = "10.77.0.11"
MINUTE = 60


def training(dataset: str, output: str, *more: str) -> list[str]:
    return [
        "train",
        "demo",
        f"data.dataset={dataset}",
        f"output={output}",
        f"tracking.uri={TRACKING}",
        *TRAINING,
        *more,
    ]


def record(cluster: Cluster, output: str) -> str:
    return cluster.store.cat_file(f"{output}/metrics.jsonl").decode()


def is_that_of_one_machine(cluster: Cluster, output: str, here: Path) -> None:
    """The curve, and MLflow's one run with every step once."""
    found = losses(record(cluster, output))
    assert found == pytest.approx(losses((here / "run" / "metrics.jsonl").read_text()), abs=1e-6)
    assert tracked(output.rsplit("/", 1)[1]) == [(step, loss) for step, loss in enumerate(found, 1)]


def renew(node: int) -> None:
    control("node", node, "kill")
    control("node", node, "start")


def processes_of_store(title: str) -> list[int]:
    pids = subprocess.run(["ip", "netns", "pids", "lumos-store"], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in pids.split() if title in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_worker_s_node_is_cut_off_for_a_minute(cluster, dataset, here):
    output = "s3://lumos/runs/worker-cut"
    with cluster.submit(*training(dataset, output)) as job:
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint", job=job)
        cut = max(cluster.nodes_of("RayTrainWorker"))
        control("node", cut, "cut")
        time.sleep(MINUTE)
        control("node", cut, "join")
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    renew(cut)
    is_that_of_one_machine(cluster, output, here)


def test_a_driver_that_was_cut_off_writes_nothing_over_its_successor(cluster, dataset, here):
    output = "s3://lumos/runs/driver-cut"
    with cluster.submit(*training(dataset, output), node=3) as first:
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint", job=first)
        control("node", 3, "cut")
        said = cluster.run(*training(dataset, output))  # it waits for the other's last sign of life to be old
        assert "continuing from the checkpoint of step" in said

        def written() -> dict[str, str]:
            return {path: info["ETag"] for path, info in cluster.store.find(output, detail=True).items()}

        whole = written()
        control("node", 3, "join")
        time.sleep(MINUTE / 2)  # for what the first one still wants to write
        assert written() == whole
        first.kill()
    renew(3)
    is_that_of_one_machine(cluster, output, here)


def test_mlflow_gives_no_answer_for_a_minute(cluster, dataset, here):
    output = "s3://lumos/runs/mlflow-silent"
    with cluster.submit(*training(dataset, output)) as job:
        wait_for(lambda: cluster.store.exists(f"{output}/metrics.jsonl"), "a first checkpoint", job=job)
        halted = processes_of_store("mlflow")
        assert halted
        for pid in halted:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(MINUTE)
        steps = len(losses(record(cluster, output)))
        for pid in halted:
            os.kill(pid, signal.SIGCONT)
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    assert steps > 8, "training stood still while MLflow was silent"
    is_that_of_one_machine(cluster, output, here)


def test_the_chain_through_a_store_that_fails_now_and_then(cluster, corpus, here):
    place = "s3://lumos/faulty"
    with faulty_proxy(5000, share=0.02, host=HERE, upstream_host="10.77.0.2") as proxy:
        settings = json.dumps({"config_kwargs": {"read_timeout": 3}})  # seconds that a request without answer costs
        through = ["--env", f"AWS_ENDPOINT_URL=http://{HERE}:{proxy.port}", "--env", f"FSSPEC_S3={settings}"]
        cluster.run("curate", "demo", "source.path=s3://lumos/corpus", f"dataset={place}/dataset", *through)
        cluster.run(*training(f"{place}/dataset", f"{place}/faulty-run"), *through)
        cluster.store.pipe_file("lumos/faulty/prompts.txt", b"A small blue bar moves up.")
        made = [f"model={place}/faulty-run/export", f"prompts={place}/prompts.txt", "seeds_per_prompt=4"]
        cluster.run("generate", "demo", *made, "replicas.num_cpus=1.5", f"output={place}/videos", *through)
        faults, requests = proxy.faults.total(), proxy.requests.total()
    assert faults > 10, f"{requests} requests went through the proxy"
    (manifest,) = cluster.store.glob(f"{place}/dataset/snapshots/*/manifest.json")
    (alone,) = here.glob("dataset/snapshots/*/manifest.json")
    assert shards(cluster.store.cat_file(manifest)) == shards(alone.read_bytes())
    is_that_of_one_machine(cluster, f"{place}/faulty-run", here)
    assert len(cluster.videos(f"{place}/videos")) == 4


@pytest.fixture(scope="module")
def many(cluster, tmp_path_factory):
    """The place of enough clips that a stage takes a while, and the shards that one machine makes of them."""
    folder = tmp_path_factory.mktemp("many")
    write_corpus(folder / "clips", 1, 600)
    cluster.store.put(f"{folder}/clips/", "lumos/many/", recursive=True)
    command = ["lumos", "curate", "demo", f"source.path={folder}/clips", f"dataset={folder}/dataset"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = folder.glob("dataset/snapshots/*/manifest.json")
    return "s3://lumos/many", shards(manifest.read_bytes())


@pytest.mark.parametrize("stage", ["split", "tokens"])
def test_curation_outlives_a_node_lost_in_a_stage(cluster, many, stage):
    source, expected = many
    dataset = f"s3://lumos/lost-in-{stage}"

    def parts() -> int:
        return len(cluster.store.glob(f"{dataset}/stages/{stage}/*/*.parquet"))

    with cluster.submit("curate", "demo", f"source.path={source}", f"dataset={dataset}") as job:
        wait_for(parts, f"a first part of {stage}", job=job)
        wait_for(lambda: max(cluster.nodes_of("MapBatches("), default=1) > 1, "work on a node that is no head", job=job)
        lost = max(cluster.nodes_of("MapBatches("), default=2)
        control("node", lost, "kill")
        before = parts()
        said, _ = job.communicate(timeout=600)
        assert job.returncode == 0, said[-4000:]
    control("node", lost, "start")
    assert before < parts(), "the stage had ended before the node was lost"
    (manifest,) = cluster.store.glob(f"{dataset}/snapshots/*/manifest.json")
    assert shards(cluster.store.cat_file(manifest)) == expected


def test_workers_are_added_and_taken_away_with_the_nodes(cluster, dataset):
    """1 -> 2 -> 1 within one job; rows, order and loss stay those of two workers throughout."""
    for node in (2, 3):
        control("node", node, "kill")
    output, whole = "s3://lumos/runs/elastic", "s3://lumos/runs/elastic-whole"
    same = ["min_workers=1", "num_workers=2", "checkpoint.every=10"]
    # At the paper's rate: one worker adds gradients up in another order than two, and 40 times the rate, as the demo
    # has it, makes differences of losses within ten steps out of those of the last bit.
    same += ["optimizer.kind=adamw", "optimizer.lr=1e-4", "optimizer.schedule=constant"]

    def workers() -> list[int]:
        path = f"{output}/metrics.jsonl"
        if not cluster.store.exists(path):
            return []
        return [json.loads(line)["workers"] for line in cluster.store.cat_file(path).decode().splitlines()]

    with cluster.submit(*training(dataset, output, *same, "steps=100000"), "--name", "elastic") as job:
        wait_for(workers, "a first checkpoint of one worker", job=job)
        control("node", 2, "start")
        wait_for(lambda: workers()[-1] == 2, "two workers", job=job)
        control("node", 2, "kill")
        wait_for(lambda: workers()[-1] == 1, "one worker again", job=job)
        subprocess.run(["lumos", "jobs", "stop", "elastic"], env=cluster.env, check=True, timeout=120)
        job.communicate(timeout=300)
    for node in (2, 3):
        control("node", node, "start")
    found = [json.loads(line) for line in record(cluster, output).splitlines()]
    assert [step["step"] for step in found] == list(range(1, len(found) + 1))
    assert [count for count, _ in groupby(step["workers"] for step in found)] == [1, 2, 1]
    cluster.run(*training(dataset, whole, *same, f"steps={len(found)}"))
    expected = [json.loads(line) for line in record(cluster, whole).splitlines()]
    assert [step["masked_tokens"] for step in found] == [step["masked_tokens"] for step in expected]
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], abs=1e-4)


@pytest.fixture(scope="module")
def model(cluster, dataset):
    output = "s3://lumos/runs/served"
    cluster.run(*training(dataset, output))
    return f"{output}/export"


def test_a_service_under_16_clients_loses_a_node_and_no_accepted_job(cluster, model, tmp_path):
    token = {"Authorization": f"Bearer {SERVE_TOKEN}"}
    url = f"http://{HEAD}:8000"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", headers=token, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    arguments = ["--model", model, "--jobs", "s3://lumos/jobs", "host=0.0.0.0", "replicas.num_replicas=2"]
    arguments += ["replicas.num_cpus=1.5", "api_replicas=2"]
    waits: list[float] = []
    end = threading.Event()

    def watch() -> None:
        since = None
        while not end.wait(0.3):
            now = time.monotonic()
            if ready():
                waits.append(now - since if since else 0.0)
                since = None
            else:
                since = since or now
        assert since is None

    with cluster.submit("serve", *arguments, "--name", "service") as job:
        wait_for(ready, "a service that is ready", job=job)
        wait_for(lambda: len(cluster.nodes_of("ServeReplica")) > 1, "replicas on different nodes")
        watcher = threading.Thread(target=watch)
        watcher.start()
        found: Any = tmp_path / "load.json"
        words = ["lumos", "benchmark", "load", "--url", url, "--clients", "16", "--duration", "90", "--as-jobs"]
        env = ENVIRONMENT | {"LUMOS_SERVE_TOKEN": SERVE_TOKEN}
        with subprocess.Popen([*words, "--json", str(found)], env=env, stdout=subprocess.PIPE, text=True) as load:
            time.sleep(30)
            lost = max(cluster.nodes_of("ServeReplica"))
            assert lost > 1
            control("node", lost, "kill")
            said, _ = load.communicate(timeout=600)
        end.set()
        watcher.join()
        subprocess.run(["lumos", "jobs", "stop", "service"], env=cluster.env, check=True, timeout=120)
        job.communicate(timeout=120)
    control("node", lost, "start")
    assert load.returncode == 0, said
    answers = json.loads(found.read_text())["answers"]
    assert answers["accepted"] == answers["200"] > 16
    assert max(waits) < 30


def test_nothing_answers_without_its_token(cluster):
    """Every port that a node listens on at its address: HTTP without a token is refused, or nobody speaks HTTP."""
    answers: dict[tuple[str, int, str], int] = {}
    figures = set()
    for name, address in {"1": HEAD, "2": "10.77.0.12", "store": "10.77.0.2"}.items():
        lines = subprocess.run(
            ["ip", "netns", "exec", f"lumos-{name}", "ss", "-Hltn"], capture_output=True, text=True, check=True
        ).stdout
        found = re.findall(r"^LISTEN +\d+ +\d+ +(\S+):(\d+) ", lines, re.MULTILINE)
        ports = {int(port) for host, port in found if not host.startswith(("127.", "[::1"))}
        assert ports
        for port in sorted(ports):
            for path in ("/", "/api/jobs/", "/api/2.0/mlflow/experiments/search?max_results=1", "/nodes", "/metrics"):
                with suppress(httpx.HTTPError):  # it is no HTTP
                    answer = httpx.get(f"http://{address}:{port}{path}", timeout=5)
                    answers[name, port, path] = answer.status_code
                    if answer.text.startswith("# HELP"):  # Ray's metrics, for Prometheus
                        figures.add((name, port))
                        assert SERVE_TOKEN not in answer.text
    answered = {(name, port) for (name, port, _), status in answers.items() if status < 400}
    # The page of the dashboard has no data of its own, and S3 asks each request for a signature, which moto does not.
    assert answered - figures <= {("1", 8265), ("store", 5000)}, answers
    assert answers["1", 8265, "/api/jobs/"] in (401, 403)
    assert answers["1", 8265, "/nodes"] in (401, 403)
    assert answers["store", 5001, "/api/2.0/mlflow/experiments/search?max_results=1"] == 401


def test_a_planted_secret_is_in_no_log_and_no_artifact(cluster, dataset):
    """That of the environment of every node; after what ran before."""
    state = Path(ENVIRONMENT["LUMOS_LOCAL_STATE"])
    looked = 0
    for file in state.rglob("*"):
        if not file.is_file() or file.is_symlink() or file == state / "extra" or file == state / "env":
            continue
        looked += 1
        assert SERVE_TOKEN.encode() not in file.read_bytes(), file
    for path in [*cluster.store.find("lumos"), *cluster.store.find("mlflow")]:
        looked += 1
        assert SERVE_TOKEN.encode() not in cluster.store.cat_file(path), path
    assert looked > 100
    listed = subprocess.run(["lumos", "jobs", "list", "--json"], env=cluster.env, capture_output=True, text=True)
    assert SERVE_TOKEN not in listed.stdout
