"""The HTTP interface over a replica in this process: no Ray, no port."""

import asyncio
import io
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from starlette.exceptions import HTTPException

from pipelines.generation.config import BatchConfig, SamplingChoice, ServeConfig, SizeConfig
from pipelines.generation.serving.guard import BodyReader
from tests.pipelines.generation.serving.in_process import client_to, listening, service_of
from tests.pipelines.generation.test_run import copy_model

PROMPT = {"prompt": "a red square moves left", "seed": 7}
JSON, FORM = "application/json", "multipart/form-data; boundary=b"
Talk = Callable[[httpx.AsyncClient], Awaitable[None]]


@asynccontextmanager
async def client_of(config: ServeConfig) -> AsyncIterator[httpx.AsyncClient]:
    async with service_of(config) as app, client_to(app) as client:
        yield client


def talk(config: ServeConfig, conversation: Talk) -> None:
    async def main() -> None:
        async with client_of(config) as client:
            await conversation(client)

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.fixture(scope="module")
def hostile(serve_config: ServeConfig) -> Iterator[str]:
    """A service for those who mean no good."""
    with listening(serve_config) as url:
        yield url


def _form(**fields: str) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    return "".join([*parts, "--b--\r\n"]).encode()


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_video_comes_back_with_how_it_was_made(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/videos/sync", json=PROMPT)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["x-lumos-seed"] == "7"
        assert answer.headers["content-disposition"] == 'inline; filename="a-red-square-moves-left-7.mp4"'
        assert num_frames(answer.content) == 9
        again = await client.post("/v1/videos/sync", json=PROMPT)
        assert again.content == answer.content
        other = await client.post("/v1/videos/sync", json={**PROMPT, "seed": 8})
        assert other.content != answer.content
        assert other.headers["x-lumos-config-hash"] == answer.headers["x-lumos-config-hash"]

    talk(serve_config, conversation)


def test_settings_of_the_request_are_used_and_name_another_config(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        usual = await client.post("/v1/videos/sync", json=PROMPT)
        for change in ({"steps": 5}, {"guidance_scale": 1.0}, {"history_ratio": 0.2}, {"size": "48x16"}, {"frames": 5}):
            answer = await client.post("/v1/videos/sync", json={**PROMPT, **change})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-lumos-config-hash"] != usual.headers["x-lumos-config-hash"]
            assert answer.content != usual.content
        with av.open(
            io.BytesIO((await client.post("/v1/videos/sync", json={**PROMPT, "size": "48x16"})).content)
        ) as video:
            assert (video.streams.video[0].width, video.streams.video[0].height) == (48, 16)
        drawn = {(await client.post("/v1/videos/sync", json={"prompt": "x"})).headers["x-lumos-seed"] for _ in range(3)}
        assert len(drawn) == 3  # a seed is drawn where none is given

    talk(serve_config, conversation)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt: Input should be a valid string, got 3"),
        ({**PROMPT, "sede": 1}, "unknown field 'sede'; known: prompt, model, seed"),
        ({**PROMPT, "seed": "7"}, "seed"),
        ({**PROMPT, "seed": -1}, "seed"),
        ({**PROMPT, "size": "large"}, "WIDTHxHEIGHT"),
        ({**PROMPT, "size": "50x32"}, "width 50 is not a multiple of 16 px, the model's grid unit: use 48 or 64"),
        ({**PROMPT, "size": "32x0"}, "height 0 is not a multiple of 16 px"),
        ({**PROMPT, "size": "99999x32"}, "width 99999"),
        ({**PROMPT, "frames": 8}, "frames 8 is not 1 + 4k: use 5 or 9"),
        ({**PROMPT, "frames": 5, "num_frames": 5}, "num_frames and frames are both given"),
        (
            {**PROMPT, "seconds": "0.5"},
            "seconds: 0.5 at 12 fps are 6 frames, not 1 + 4k: use 0.4167 (5 frames) or 0.75 (9 frames)",
        ),
        ({**PROMPT, "seconds": "long"}, "seconds: 'long' is no number"),
        ({**PROMPT, "model": "sora-2"}, "model: 'sora-2' is not served here; there are: export"),
        ({**PROMPT, "num_inference_steps": 201}, "num_inference_steps is 201; this service allows at most 200"),
        ({**PROMPT, "input_reference": "http://127.0.0.1/x.png"}, "is no data: URL with base64"),
        (
            {**PROMPT, "input_reference": "data:text/html;base64,PGI+"},
            "input_reference: 'text/html' is neither a picture nor a video",
        ),
        (
            {**PROMPT, "input_reference": "data:image/png;base64,AAAA"},
            "input_reference: it is neither a picture nor a video",
        ),
        ({**PROMPT, "steps": 201}, "at most 200"),
        ({**PROMPT, "history_ratio": 1.5}, "history_ratio"),
        ({**PROMPT, "guidance_scale": -1}, "guidance_scale"),
        ({**PROMPT, "guidance_scale": 1e39}, "guidance_scale: Input should be less than or equal to 1000, got 1e+39"),
        ({**PROMPT, "frames": 4 * 10**400 + 1}, "frames"),
        ({"prompt": "word " * 1000}, "use a shorter prompt"),
        ({**PROMPT, "size": "256x256"}, "256x256, 9 frames at 12 fps alone make 3185 tokens, the model takes 600"),
        ({**PROMPT, "seconds": 0}, "seconds: 0.0 is not above 0 and at most 100000"),
        (["not an object"], "body"),
    ],
)
def test_bad_requests_are_answered_with_400_and_a_reason(serve_config: ServeConfig, body: Any, message: str) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/videos/sync", json=body)
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]

    talk(serve_config, conversation)


def test_the_field_that_makes_a_video_too_long_is_named(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        for change, field in (({"size": "256x256"}, "size"), ({"frames": 401}, "frames"), ({"seconds": 40}, "seconds")):
            answer = await client.post("/v1/videos/sync", json={**PROMPT, **change})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
            assert "prompt" not in answer.json()["error"]["message"]

    talk(serve_config, conversation)


def test_broken_json_other_paths_and_methods_have_the_same_form_of_error(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        broken = await client.post("/v1/videos/sync", content=b"{", headers={"content-type": "application/json"})
        assert (broken.status_code, broken.json()["error"]["message"][:28]) == (400, "the body is not valid JSON: ")
        for answer, status in [(await client.get("/nothing"), 404), (await client.put("/v1/videos"), 405)]:
            assert answer.status_code == status
            assert answer.json()["error"]["message"]

    talk(serve_config, conversation)


def test_a_path_with_a_slash_more_is_none(serve_config: ServeConfig) -> None:
    """OpenAPI tells of no redirect, so there is none."""

    async def conversation(client: httpx.AsyncClient) -> None:
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/models", "/health"} <= paths.keys()
        for path, operations in paths.items():
            for method in operations:
                there = path.replace("{video_id}", "x")
                answer = await client.request(method, f"{there}/", json={})
                assert answer.status_code == 404, (method, path)
                assert method == "head" or answer.json()["error"]["message"] == "Not Found"
                found = await client.request(method, there, json={})
                assert "Not Found" not in found.text
                assert found.status_code != 307

    talk(serve_config, conversation)


@pytest.mark.parametrize(
    ("content", "kind", "field", "words"),
    [
        (b'{"prompt": "a", "seed": 1, "prompt": "b"}', JSON, "prompt", "prompt is given twice"),
        (b'{"prompt": "a", "shortcuts": {"order": "halton", "order": "confidence"}}', JSON, "order", "order is given"),
        (_form(shortcuts='{"order": "halton", "order": "halton"}'), FORM, "shortcuts", "order is given twice"),
        (_form(seed="1") + _form(seed="2"), FORM, "seed", "seed is given twice"),
        (b'{"prompt": "a", "input_reference": {"x": 1}}', JSON, "input_reference", "input_reference.image_url: Field"),
        (b'{"prompt": "a", "input_reference": 3}', JSON, "input_reference", "must be an object of image_url, got 3"),
        (b'{"prompt": "a", "seconds": []}', JSON, "seconds", "seconds: Input should be a valid"),
        (b'{"prompt": "a", "str": 1}', JSON, "str", "unknown field 'str'; known: prompt, model"),
    ],
)
def test_what_is_written_twice_or_otherwise_than_it_may_be_is_named(
    hostile: str, content: bytes, kind: str, field: str, words: str
) -> None:
    content = content.replace(b"--b--\r\n--b", b"--b")
    answer = httpx.post(f"{hostile}/v1/videos", content=content, headers={"content-type": kind}, timeout=60.0)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    assert words in answer.json()["error"]["message"]


def test_long_bodies_are_not_read(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        for content in (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', pieces()):
            answer = await client.post("/v1/images/generations", content=content)
            assert answer.status_code == 413
            assert "at most 1048576 bytes" in answer.json()["error"]["message"]

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        pytest.fail("was read")

    talk(serve_config, conversation)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"prompt": ' + b"[" * 300_000 + b"]" * 300_000 + b"}", JSON),
        (b'{"prompt": {' + b'"a": {' * 50_000, JSON),
        (b'{"prompt": "\\ud800"}', JSON),
        (b'{"prompt": "\xff\xfe"}', JSON),
        (b'{"prompt": "x", "seed": 1e400}', JSON),
        (b'{"prompt": "x", "num_frames": ' + b"9" * 5000 + b"}", JSON),
        (b'{"prompt": "x", "guidance_scale": NaN}', JSON),
        (b'{"prompt": "x", "input_reference": {"image_url": "file:///etc/passwd"}}', JSON),
        (b'{"prompt": "x", "input_reference": {"file_id": "../../etc/passwd"}}', JSON),
        (b'{"prompt": "x", "model": "../../etc"}', JSON),
        (b"", JSON),
        (b"", FORM),
        (b"--b\r\n\r\nx", FORM),
        (b'--b\r\nContent-Disposition: form-data; name="video["\r\n\r\nx\r\n--b--\r\n', FORM),
        (b"x", "multipart/form-data"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/extensions", "/v1/images/generations"])
def test_hostile_bodies_are_refused(hostile: str, content: bytes, kind: str, path: str) -> None:
    answer = httpx.post(hostile + path, content=content, headers={"content-type": kind}, timeout=60.0)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert "/etc" not in answer.text.replace("../../etc", "").replace("file:///etc/passwd", "")


def test_a_body_of_a_million_values_holds_nobody_up(hostile: str) -> None:
    fields = b"{" + b",".join(b'"k%07d":1' % number for number in range(1_000_000)) + b"}"
    for content in (fields, b'{"prompt": "x", "input_reference": ' + fields + b"}", b"[" + b"1," * 8_000_000 + b"1]"):
        begin = time.monotonic()
        answer = httpx.post(f"{hostile}/v1/videos", content=content, headers={"content-type": JSON}, timeout=60.0)
        assert answer.status_code == 400
        assert "more than 11000 commas" in answer.json()["error"]["message"]
        assert time.monotonic() - begin < 2.0  # 20 s when each was an error of its own
    for path, field in (("/v1/videos", "input_reference"), ("/v1/videos/extensions", "video")):
        begin = time.monotonic()
        form = {"prompt": (None, "x"), field: (None, fields)}
        answer = httpx.post(hostile + path, files=form, timeout=60.0)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert "more than 11000 commas" in answer.json()["error"]["message"]
        assert time.monotonic() - begin < 2.0  # 5 s
    answer = httpx.post(f"{hostile}/v1/videos/sync", json={**PROMPT, "prompt": "," * 20}, timeout=60.0)
    assert answer.status_code == 200


def test_a_picture_that_unfolds_to_gigabytes_is_refused(hostile: str) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000_000, 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    answer = httpx.post(
        f"{hostile}/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", bomb)}, timeout=60.0
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_reference"


async def begin_body(client: httpx.AsyncClient) -> httpx.Response:
    """A request whose body never ends."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    return await client.post("/v1/videos/sync", content=pieces(), headers={"content-length": "100"})


def test_a_body_that_does_not_arrive_in_time_answers_408(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        answer = await begin_body(client)
        assert answer.status_code == 408
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["message"] == "the body did not arrive within 0.1 s"
        assert (await client.post("/v1/videos/sync", json=PROMPT)).status_code == 200

    talk(replace(serve_config, body_timeout_s=0.1), conversation)


def test_of_too_many_bodies_the_oldest_gives_way_and_whole_ones_are_read(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        open_bodies = [asyncio.create_task(begin_body(client)) for _ in range(5)]
        await asyncio.wait(open_bodies[:2])
        assert [task.done() for task in open_bodies] == [True, True, False, False, False]
        for answer in (task.result() for task in open_bodies[:2]):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["message"] == "more than 3 requests are sending their bodies"
        assert (await client.post("/v1/videos/sync", json=PROMPT)).status_code == 200
        assert open_bodies[2].result().status_code == 503  # it made room
        assert (await client.get("/v1/models")).status_code == 200
        for task in open_bodies[3:]:
            assert not task.done()
            task.cancel()

    talk(replace(serve_config, body_timeout_s=60.0, max_open_bodies=3), conversation)


def test_a_token_is_asked_for_where_one_is_set(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "Bearer é"},
        ):
            raw = {key: value.encode("latin-1") for key, value in headers.items()}
            answer = await client.post("/v1/videos/sync", json=PROMPT, headers=raw)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        broken = await client.post("/v1/videos/sync", content=b"{")
        assert broken.status_code == 401  # whoever may not ask is told no more
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        good = {"Authorization": "Bearer sesame"}
        assert (await client.post("/v1/videos/sync", json=PROMPT, headers=good)).status_code == 200
        assert (await client.get("/v1/models", headers=good)).status_code == 200

    talk(replace(serve_config, token="sesame"), conversation)


def test_a_full_queue_answers_503_and_health_checks_go_on(serve_config: ServeConfig) -> None:
    config = replace(serve_config, batch=BatchConfig(max_size=1, max_queued=1))

    async def conversation(client: httpx.AsyncClient) -> None:
        long = {**PROMPT, "steps": 50, "frames": 33}
        tasks = [asyncio.create_task(client.post("/v1/videos/sync", json=long))]
        while (await client.get("/healthz")).json()["running"] == 0:
            await asyncio.sleep(0.005)
        tasks += [asyncio.create_task(client.post("/v1/videos/sync", json=long)) for _ in range(5)]
        await asyncio.sleep(0.05)
        health = await asyncio.wait_for(client.get("/healthz"), 10.0)
        assert health.json() == {"status": "ok", "queued": 1, "running": 1}
        answers = await asyncio.gather(*tasks)
        assert answers[0].status_code == 200
        # Which of those that came at once is let in to wait is nobody's matter.
        assert sorted(answer.status_code for answer in answers[1:]) == [200, 503, 503, 503, 503]
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert "waiting already" in refused.json()["error"]["message"]

    talk(config, conversation)


def test_a_video_that_takes_too_long_answers_504(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/videos/sync", json={**PROMPT, "steps": 200, "frames": 33})
        assert answer.status_code == 504
        assert "0.2 s" in answer.json()["error"]["message"]

    talk(replace(serve_config, timeout_s=0.2), conversation)


def test_the_model_and_the_interface_are_described(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        model = (await client.get("/v1/models")).json()["data"][0]
        assert model["defaults"] == {
            "size": "32x32",
            "frames": 9,
            "fps": 12.0,
            "steps": 4,
            "guidance_scale": 3.0,
            "history_ratio": 0.7,
            "temperature": 1.0,
            "draw_temperature": 1.0,
            "shortcuts": None,
        }
        assert model["limits"]["size_multiple_of"] == 16
        schema = (await client.get("/openapi.json")).json()
        operation = schema["paths"]["/v1/videos/sync"]["post"]
        assert {"200", "400", "408", "413", "415", "429", "500", "503", "504"} <= operation["responses"].keys()
        assert "video/mp4" in operation["responses"]["200"]["content"]
        assert (await client.get("/docs")).status_code == 200

    talk(serve_config, conversation)


def test_requests_are_drawn_as_the_model_recommends(serve_config: ServeConfig, model_dir: Path, tmp_path: Path) -> None:
    recommended = {"num_steps": 3, "guidance_scale": 2.0, "history_ratio": 0.4}
    model = copy_model(model_dir, tmp_path / "model", info={"sampling": recommended})
    config = replace(serve_config, model=str(model), sampling=SamplingChoice())

    async def conversation(client: httpx.AsyncClient) -> None:
        defaults = (await client.get("/v1/models")).json()["data"][0]["defaults"]
        assert (defaults["steps"], defaults["guidance_scale"], defaults["history_ratio"]) == (3, 2.0, 0.4)
        usual = await client.post("/v1/videos/sync", json=PROMPT)
        named = {"steps": 3, "guidance_scale": 2.0, "history_ratio": 0.4}
        assert (await client.post("/v1/videos/sync", json={**PROMPT, **named})).content == usual.content
        assert (await client.post("/v1/videos/sync", json={**PROMPT, "steps": 4})).content != usual.content

    talk(config, conversation)


def test_images_come_as_png(serve_config: ServeConfig) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/videos/sync", json=PROMPT)
        assert answer.headers["content-type"] == "image/png"
        assert answer.content.startswith(b"\x89PNG")
        assert (await client.post("/v1/videos/sync", json={**PROMPT, "frames": 5})).status_code == 400

    talk(replace(serve_config, format="png", video=SizeConfig(num_frames=1)), conversation)


class Arriving:
    """A request whose body comes after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def body(self) -> bytes:
        await asyncio.sleep(self.seconds)
        return b""


def test_a_body_whose_time_is_just_up_harms_no_whole_one() -> None:
    async def late_whole(reader: BodyReader) -> None:
        await asyncio.sleep(0.045)
        await reader.read(Arriving(0.0))  # type: ignore[arg-type]

    async def both() -> list[BaseException | None]:
        reader = BodyReader(0.05, 1, 1 << 20)
        bodies = [reader.read(Arriving(10.0)), late_whole(reader)]  # type: ignore[arg-type]
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.05)  # so that all timers come due at once
        return await asyncio.gather(*bodies, return_exceptions=True)

    for _ in range(5):
        late, whole = asyncio.run(both())
        assert whole is None
        assert isinstance(late, HTTPException)
        assert late.status_code in (408, 503)  # on a busy machine it gives way before its time is seen to be up
