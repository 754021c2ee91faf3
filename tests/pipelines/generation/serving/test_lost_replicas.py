"""Real Ray Serve whose replicas are killed while they make videos."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.cluster import connect
from pipelines.generation.config import BatchConfig, ReplicaConfig, ServeConfig
from pipelines.generation.model import read_card
from pipelines.generation.serving.run import http_application
from tests.pipelines.generation.conftest import CAPTIONS, free_port

BODIES = [{"prompt": CAPTIONS[seed % 2], "seed": seed, "steps": 100, "frames": 17} for seed in range(8)]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with connect(num_cpus=3):
        yield


@contextmanager
def service(config: ServeConfig, *, num_replicas: int = 1) -> Iterator[str]:
    config = replace(
        config,
        port=free_port(),
        batch=BatchConfig(max_size=4, max_queued=16),
        replicas=ReplicaConfig(num_cpus=0.5, threads=1, num_replicas=num_replicas),
    )
    with http_application(read_card(config), config) as url:
        yield url


def replicas() -> list[psutil.Process]:
    """The processes that hold the model, in this test's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:lumos:generator" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@asynccontextmanager
async def requests_in_flight(http: httpx.AsyncClient) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    tasks = [asyncio.create_task(http.post("/v1/videos", json=body)) for body in BODIES]
    while not (await http.get("/healthz")).json()["running"]:
        await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    yield tasks


@pytest.mark.parametrize("num_replicas", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_requests_of_a_killed_replica_are_answered_by_another_with_the_same_videos(
    serve_config: ServeConfig, num_replicas: int
) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as http:
            undisturbed = await asyncio.gather(*(http.post("/v1/videos", json=body) for body in BODIES))
            assert len({answer.content for answer in undisturbed}) == len(BODIES)
            before = replicas()
            assert len(before) == num_replicas
            async with requests_in_flight(http) as tasks:
                before[0].kill()
                answers = await asyncio.gather(*tasks)
            assert [answer.status_code for answer in answers] == [200] * len(BODIES)
            assert [answer.content for answer in answers] == [answer.content for answer in undisturbed]
            assert (await http.get("/healthz")).status_code == 200

    with service(serve_config, num_replicas=num_replicas) as url:
        asyncio.run(main())


def test_where_no_replica_comes_in_time_the_answer_is_503_with_retry_after(
    serve_config: ServeConfig, model_dir: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        shutil.rmtree(model)  # so that no new replica starts
        (replica,) = replicas()
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
            async with requests_in_flight(http) as tasks:
                replica.kill()
                answers = await asyncio.gather(*tasks)
            for answer in answers:
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert "was lost" in answer.json()["error"]["message"]
            assert (await http.get("/healthz")).status_code == 503

    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    with service(replace(serve_config, model=str(model), timeout_s=5.0)) as url:
        asyncio.run(main())
