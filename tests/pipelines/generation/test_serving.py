"""Real Ray Serve: bulk runs through a handle, then the service over HTTP, in one local cluster."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import ray
from ray.util import placement_group, remove_placement_group

from pipelines.config import config_to_yaml
from pipelines.errors import JobError, UserError
from pipelines.generation.bulk import run
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import BatchConfig, GenerateConfig, ReplicaConfig, ServeConfig
from pipelines.generation.serving import run as serving_run
from pipelines.generation.serving.run import http_application, read_cards
from tests.cluster import own_cluster
from tests.pipelines.generation.conftest import free_port

TOKEN = "sesame"
PROMPT: dict[str, Any] = {"prompt": "a red square moves left", "seed": 7}
LONG = {"steps": 50, "frames": 33}


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with own_cluster(num_cpus=3):
        yield


@pytest.fixture(scope="module")
def service(_cluster: None, serve_config: ServeConfig) -> Iterator[str]:
    config = replace(serve_config, port=free_port(), token=TOKEN, body_timeout_s=4.0)
    with http_application(read_cards(config), config) as url:
        yield url


def client(url: str, token: str = TOKEN) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60.0)


def manifest_of(config: GenerateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "manifest.jsonl").read_text().splitlines()]


def videos_of(config: GenerateConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.output).glob("*.mp4")}


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_bulk_resume_makes_only_what_is_missing_and_the_same_bytes(
    generate_config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(generate_config, seeds_per_prompt=3)
    first = generate(config)
    assert (first.generated, first.skipped) == (6, 0)
    videos, manifest = videos_of(config), manifest_of(config)
    assert {row["path"] for row in manifest} == videos.keys()
    assert [(row["index"], row["seed"]) for row in manifest] == [(i, seed) for i in (0, 1) for seed in (0, 1, 2)]
    for data in videos.values():
        with av.open(io.BytesIO(data)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
    note = json.loads((Path(config.output) / "generate.json").read_text())
    assert note["config"]["seeds_per_prompt"] == 3
    assert note["sampling"] | {"num_steps": 4, "guidance_scale": 3.0, "history_ratio": 0.7} == note["sampling"]
    assert note["provenance"]["packages"]["torch"]

    with monkeypatch.context() as patch:
        patch.setattr(run, "_make", lambda *_, **__: pytest.fail("videos were made"))
        again = generate(config)
    assert (again.generated, again.skipped) == (0, 6)

    gone, changed = sorted(videos)[1], sorted(videos)[4]
    (Path(config.output) / gone).unlink()
    (Path(config.output) / changed).write_bytes(b"not what it was")
    # Alone in their batches, and beside a replica more, they come out as they did among others.
    other = replace(
        config, batch=BatchConfig(max_size=1), replicas=ReplicaConfig(num_replicas=2, num_cpus=0.5, threads=1)
    )
    assert generate(other).generated == 2
    assert videos_of(config) == videos
    assert manifest_of(config) == manifest


@pytest.mark.usefixtures("_cluster")
def test_more_than_this_machine_has_is_refused_at_once(generate_config: GenerateConfig) -> None:
    with pytest.raises(UserError, match=r"9 replicas of num_cpus 4 .* need 36 CPU \(there is 3\)"):
        generate(replace(generate_config, replicas=ReplicaConfig(num_replicas=9, num_cpus=4.0)))


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_replicas_that_wait_for_room_say_so(
    generate_config: GenerateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    held = placement_group([{"CPU": 2.75}])
    ray.get(held.ready(), timeout=60)
    later = threading.Timer(60, remove_placement_group, (held,))
    later.start()
    assert generate(generate_config).generated == 2
    later.join()
    said = capsys.readouterr().err
    assert re.search(
        r"waiting for room for 1 of the replicas, \{.*CPU.*\} each \(free: .*, for \d+ s now and until", said
    )


def test_http_invariance_videos_are_the_same_alone_and_in_company(service: str) -> None:
    async def main() -> None:
        async with client(service) as http:
            alone = await http.post("/v1/videos/sync", json=PROMPT)
            assert alone.status_code == 200, alone.text
            assert alone.headers["content-type"] == "video/mp4"
            with av.open(io.BytesIO(alone.content)) as container:
                assert sum(1 for _ in container.decode(video=0)) == 9
            twice = await asyncio.gather(*(http.post("/v1/videos/sync", json=PROMPT) for _ in range(2)))
            other = {"prompt": "a blue circle moves up over a green background", "seed": 1}
            mixed = await asyncio.gather(*(http.post("/v1/videos/sync", json=body) for body in (other, PROMPT)))
            assert [answer.content for answer in (*twice, mixed[1])] == [alone.content] * 3
            assert mixed[0].content != alone.content

    asyncio.run(main())


def test_http_errors(service: str) -> None:
    async def main() -> None:
        async with client(service) as http:
            bad = await http.post("/v1/videos/sync", json={**PROMPT, "size": "33x32"})
            assert (bad.status_code, bad.json()["error"]["message"][:8]) == (400, "width 33")
            for given in ("mine-1", None):  # one id, which Serve's proxy tells
                headers = {} if given is None else {"x-request-id": given}
                ids = (await http.get("/health", headers=headers)).headers.get_list("x-request-id")
                assert (len(ids), ids[0] == given) == (1, given is not None)
            unknown = await http.post("/v1/videos/sync", json={**PROMPT, "fames": 9})
            assert (unknown.status_code, unknown.json()["error"]["field"]) == (400, "fames")
        async with client(service, "wrong") as http:
            assert (await http.post("/v1/videos/sync", json=PROMPT)).status_code == 401
            assert (await http.get("/v1/models")).status_code == 401
            assert (await http.get("/healthz")).json() == {"status": "ok", "queued": 0, "running": 0}

    asyncio.run(main())


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-request-id", b"no spaces")],
        [(b"x-request-id", b"x" * 65)],
        [(b"x-request-id", "\u00e9".encode())],
        [(b"x-request-id", b"\xe9")],  # to which Serve's proxy answers 500 of itself, as to those below
        [(b"x-request-id", b"one"), (b"x-request-id", b"two")],
        [(b"x-session-id", b"\xe9")],
        [(b"Serve-Multiplexed-Model-Id", b"\xe9")],
    ],
)
def test_http_an_id_that_no_log_can_hold_is_replaced_in_answer_and_log(
    service: str, serve_config: ServeConfig, headers: list[tuple[bytes, bytes]]
) -> None:
    answer = httpx.get(f"{service}/health", headers=headers, timeout=60.0)
    assert answer.status_code == 200, answer.text
    (name,) = answer.headers.get_list("x-request-id")
    assert re.fullmatch(r"[0-9a-f]{16}", name)
    begin = time.monotonic()
    while not any(name in path.read_text() for path in Path(serve_config.jobs, "log").glob("*.jsonl")):
        assert time.monotonic() - begin < 5.0
        time.sleep(0.05)


def test_http_full_queue_is_503_and_health_checks_go_on(service: str) -> None:
    async def main() -> None:
        async with client(service) as http:
            tasks = [asyncio.create_task(http.post("/v1/videos/sync", json={**PROMPT, **LONG})) for _ in range(12)]
            delays = []
            while not all(task.done() for task in tasks):
                begin = time.monotonic()
                assert (await http.get("/healthz")).status_code == 200
                delays.append(time.monotonic() - begin)
                await asyncio.sleep(0.02)
            answers = [task.result() for task in tasks]
            refused = [answer for answer in answers if answer.status_code == 503]
            done = [answer for answer in answers if answer.status_code == 200]
            assert len(done) >= 2  # at least those that the queue holds
            assert refused
            assert len(done) + len(refused) == 12
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
            assert len({answer.content for answer in done}) == 1
            assert max(delays) < 5.0

    asyncio.run(main())


def test_http_a_client_that_leaves_frees_its_place(service: str) -> None:
    async def main() -> None:
        async with client(service) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/videos/sync", json={**PROMPT, **LONG, "steps": 200}, timeout=0.15)
            begin = time.monotonic()
            while (status := (await http.get("/healthz")).json())["running"] or status["queued"]:
                assert time.monotonic() - begin < 5.0
                await asyncio.sleep(0.02)
            assert (await http.post("/v1/videos/sync", json=PROMPT)).status_code == 200

    asyncio.run(main())


def test_http_hundreds_of_unfinished_bodies_stop_nobody_else(service: str) -> None:
    head = (
        f"POST /v1/videos/sync HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )

    async def begin_body() -> str:
        """The first line of the answer, once the service has closed the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(service).port)
        writer.write(head.encode())
        await writer.drain()
        opened.release()
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer.split(b"\r\n")[0].decode()

    async def main() -> None:
        async with client(service) as http:
            before = await http.post("/v1/videos/sync", json=PROMPT)
            slow = [asyncio.create_task(begin_body()) for _ in range(400)]
            for _ in slow:
                await opened.acquire()
            during = await http.post("/v1/videos/sync", json=PROMPT)
            assert (during.status_code, during.content) == (200, before.content)
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/v1/models")).status_code == 200
            assert not all(task.done() for task in slow)
            answers = Counter(await asyncio.gather(*slow))
            assert answers.keys() == {"HTTP/1.1 408 Request Timeout", "HTTP/1.1 503 Service Unavailable"}
            assert (await http.get("/healthz")).json() == {"status": "ok", "queued": 0, "running": 0}
            assert (await http.post("/v1/videos/sync", json=PROMPT)).content == before.content

    opened = asyncio.Semaphore(0)
    asyncio.run(main())


def test_one_video_into_one_file_beside_the_service(
    service: str, generate_config: GenerateConfig, tmp_path: Path
) -> None:
    config = replace(generate_config, prompts=(PROMPT["prompt"],), seed=7, output=str(tmp_path / "one.mp4"))
    assert generate(config).generated == 1
    assert [path.name for path in tmp_path.iterdir()] == ["one.mp4"]
    # The same prompt, seed and settings give the same bytes through either way.
    answer = httpx.post(
        f"{service}/v1/videos/sync", json=PROMPT, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60.0
    )
    assert answer.content == (tmp_path / "one.mp4").read_bytes()


def test_a_service_goes_on_whatever_is_wrong_with_the_models_that_it_is_told_to_read(
    serve_config: ServeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([PermissionError(13, "Permission denied", "model.safetensors"), None, KeyboardInterrupt()])

    def read(_: ServeConfig) -> dict[str, Any]:
        signal.raise_signal(signal.SIGHUP)  # the next time
        if (error := next(found)) is not None:
            raise error
        return {}

    def start(*_: object) -> None:
        raise JobError("the model did not start: no memory")

    monkeypatch.setattr(serving_run, "read_cards", read)
    monkeypatch.setattr(serving_run, "service_deployment", lambda *_: None)
    monkeypatch.setattr(serving_run, "run_application", start)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
    before = signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(KeyboardInterrupt):
            serving_run._replace_when_told(serve_config)
    finally:
        signal.signal(signal.SIGHUP, before)
    read_wrong, not_started = capsys.readouterr().err.splitlines()
    assert read_wrong.startswith("the models stay as they were: PermissionError: [Errno 13] Permission denied: 'model.")
    assert not_started.startswith("the model did not start: no memory; old ones ended for it: put the folder right")


@pytest.mark.slow
def test_lumos_serve_announces_itself_replaces_its_models_when_told_and_ends_cleanly(
    serve_config: ServeConfig, tmp_path: Path
) -> None:
    shutil.copytree(serve_config.model, tmp_path / "small")
    config = replace(
        serve_config,
        port=free_port(),
        max_replicas=2,
        models={"small": str(tmp_path / "small")},
        batch=BatchConfig(max_size=1, max_queued=64),
    )
    (tmp_path / "serve.yaml").write_text(config_to_yaml(config))
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "LUMOS_SERVE_TOKEN")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", str(tmp_path / "serve.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not any("curl" in line for line in lines):
            line = process.stdout.readline()
            assert line, f"it ended: {''.join(lines)}"
            lines.append(line)
        url = f"http://127.0.0.1:{config.port}"
        assert url in "".join(lines)
        assert lines[0] == "loading\n"
        models = httpx.get(f"{url}/v1/models", timeout=60.0).json()["data"]
        assert [model["id"] for model in models] == [Path(serve_config.model).parent.name, "small"]
        small = {**PROMPT, "model": "small"}
        answer = httpx.post(f"{url}/v1/videos/sync", json=small, timeout=60.0)
        assert answer.status_code == 200
        job = httpx.post(f"{url}/v1/videos", json={**small, **LONG}, timeout=60.0).json()
        body = {**PROMPT, **LONG, "steps": 200}
        with ThreadPoolExecutor(24) as pool:  # more than is done in the 5 s that Serve would give them
            direct = [pool.submit(httpx.post, f"{url}/v1/videos/sync", json=body, timeout=300.0) for _ in range(24)]
            while httpx.get(f"{url}/ready", timeout=60.0).json()["queued"] < 8:
                time.sleep(0.05)
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == "the models were read anew\n"
        assert [future.result().status_code for future in direct] == [200] * len(direct)
        while (found := httpx.get(f"{url}/v1/videos/{job['id']}", timeout=60.0)).json()["status"] != "completed":
            assert found.json()["status"] in ("queued", "in_progress"), found.text
            time.sleep(0.1)
        assert httpx.post(f"{url}/v1/videos/sync", json=small, timeout=60.0).content == answer.content
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        process.kill()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", config.port))
