"""Real Ray Serve whose replicas are killed while they make videos."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.generation.config import BatchConfig, ReplicaConfig, ServeConfig
from pipelines.generation.serving.jobs import Job
from pipelines.generation.serving.run import http_application, read_cards
from tests.cluster import own_cluster
from tests.pipelines.generation.conftest import CAPTIONS, free_port

BODIES = [{"prompt": CAPTIONS[seed % 2], "seed": seed, "steps": 100, "frames": 17} for seed in range(8)]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with own_cluster(num_cpus=3):
        yield


@contextmanager
def service(config: ServeConfig, *, num_replicas: int = 1, api_replicas: int = 1) -> Iterator[str]:
    config = replace(
        config,
        port=free_port(),
        api_replicas=api_replicas,
        batch=BatchConfig(max_size=4, max_queued=16),
        replicas=ReplicaConfig(num_cpus=0.5, threads=1, num_replicas=num_replicas),
    )
    with http_application(read_cards(config), config) as url:
        yield url


def replicas(deployment: str = "generator") -> list[psutil.Process]:
    """The processes that hold the model, or speak HTTP, in this test's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:lumos:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@asynccontextmanager
async def requests_in_flight(http: httpx.AsyncClient) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    tasks = [asyncio.create_task(http.post("/v1/videos/sync", json=body)) for body in BODIES]
    while not (await http.get("/healthz")).json()["running"]:
        await asyncio.sleep(0.01)
    assert not any(task.done() for task in tasks)
    yield tasks


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_requests_of_a_killed_replica_are_answered_by_another_with_the_same_videos(
    serve_config: ServeConfig, num_replicas: int
) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as http:
            undisturbed = await asyncio.gather(*(http.post("/v1/videos/sync", json=body) for body in BODIES))
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_replicas_grow_with_the_queue_and_the_new_one_takes_its_share(
    serve_config: ServeConfig, tmp_path: Path
) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as http:
            assert len(replicas()) == 1
            bodies = [{**BODIES[0], "seed": seed, "steps": 200} for seed in range(20)]
            first = await http.post("/v1/videos", json=bodies[0])
            alone = await finished(http, first.json()["id"])
            waiting: set[asyncio.Task[bytes]] = set()
            async with asyncio.timeout(120):
                while len(replicas()) < 2:  # the queue is kept long
                    while len(waiting) < len(bodies):
                        body = bodies[len(waiting)]
                        created = (await http.post("/v1/videos", json=body)).json()
                        waiting.add(asyncio.create_task(finished(http, created["id"])))
                    done, waiting = await asyncio.wait(waiting, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                    assert all(task.result() for task in done)
            assert all(await asyncio.gather(*waiting))
            again = await asyncio.gather(*(http.post("/v1/videos/sync", json=bodies[0]) for _ in range(8)))
            assert [answer.content for answer in again] == [alone] * 8

    config = replace(serve_config, jobs=str(tmp_path), max_replicas=2)
    with service(config) as url:
        asyncio.run(main())


async def finished(http: httpx.AsyncClient, video_id: str) -> bytes:
    """The file of a job, whatever dies meanwhile."""
    while True:
        try:
            answer = await http.get(f"/v1/videos/{video_id}")
        except httpx.HTTPError:  # its process was killed on the way
            continue
        assert answer.status_code in (200, 500, 503), answer.text  # never 404
        if answer.status_code == 200 and answer.json()["status"] in ("completed", "failed"):
            assert answer.json()["status"] == "completed", answer.text
            content = await http.get(f"/v1/videos/{video_id}/content")
            if content.status_code == 200:
                return content.content
        await asyncio.sleep(0.1)


@pytest.mark.slow
def test_exactly_once_jobs_of_killed_processes_are_done_and_every_api_process_knows_every_job(
    serve_config: ServeConfig, tmp_path: Path
) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120.0) as http:
            undisturbed = await asyncio.gather(*(http.post("/v1/videos/sync", json=body) for body in BODIES))
            assert len(replicas("api")) == 4
            created = [(await http.post("/v1/videos", json=body)).json() for body in BODIES]
            jobs = [Job(**json.loads((tmp_path / f"{video['id']}.json").read_text())) for video in created]
            while (await http.get(f"/v1/videos/{created[0]['id']}")).json()["status"] == "queued":
                await asyncio.sleep(0.01)
            replicas()[0].kill()
            doing = {int(job.worker.partition("-")[0]) for job in jobs}
            next(process for process in replicas("api") if process.pid in doing).kill()
            videos = await asyncio.gather(*(finished(http, video["id"]) for video in created))
            assert videos == [answer.content for answer in undisturbed]
            for video in created:
                assert len(list((tmp_path / "files" / video["id"]).glob("video-*"))) == 1

    with service(replace(serve_config, jobs=str(tmp_path)), num_replicas=2, api_replicas=4) as url:
        asyncio.run(asyncio.wait_for(main(), 200))
