"""Ranges of a video, as browsers ask for them to play from any place: alike from a folder and from S3."""

import asyncio
import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse

from pipelines.generation.config import ServeConfig
from pipelines.generation.serving.content import file_answer
from pipelines.generation.serving.jobs import JobStore
from pipelines.media import encode_jpeg
from tests.pipelines.generation.serving.in_process import client_to, finished, service_of
from tests.pipelines.generation.serving.test_jobs import PROMPT, post

pytestmark = pytest.mark.usefixtures("quick_looks")


def test_ranges_of_a_video_are_sent(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            video = await finished(client, (await post(client, {**PROMPT, "steps": 1}))["id"])
            url = f"/v1/videos/{video['id']}/content"
            whole = await client.get(url)
            data, size, tag = whole.content, len(whole.content), whole.headers["etag"]
            assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
            assert int(whole.headers["content-length"]) == size > 100

            for text, start, stop in (
                ("bytes=0-0", 0, 1),
                ("bytes=0-1", 0, 2),  # Safari's first
                ("bytes=50-", 50, size),
                (f"bytes=60-{size + 9}", 60, size),
                ("bytes=-7", size - 7, size),
                (f"bytes=-{size + 9}", 0, size),
                ("Bytes=3-5", 3, 6),
            ):
                part = await client.get(url, headers={"Range": text})
                assert (part.status_code, part.content) == (206, data[start:stop]), text
                assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
                assert int(part.headers["content-length"]) == stop - start
                for name in ("content-type", "etag", "x-lumos-seed", "content-disposition"):
                    assert part.headers[name] == whole.headers[name]

            for text in (
                "bytes=0-1,4-5",
                "bytes=9-3",
                "bytes=-",
                "bytes=",
                "bytes=a-b",
                "items=0-1",
                "x",
                "",
                "bytes=1",
            ):
                again = await client.get(url, headers={"Range": text})
                assert (again.status_code, again.content) == (200, data), text
            again = await client.get(url, headers={"Range": f"bytes={'9' * 5000}-"})
            assert (again.status_code, again.content) == (200, data)

            for text in (f"bytes={size}-", f"bytes={size}-{size + 5}", "bytes=-0", f"bytes={'9' * 18}-"):
                refused = await client.get(url, headers={"Range": text})
                assert (refused.status_code, refused.headers["content-range"]) == (416, f"bytes */{size}"), text
                assert f"{size} bytes" in refused.json()["error"]["message"]

            for other, status in ((tag, 206), ('"other"', 200)):
                found = await client.get(url, headers={"Range": "bytes=0-9", "If-Range": other})
                assert found.status_code == status
            assert (await client.get(url, headers={"Range": f"bytes={size}-", "If-Range": "x"})).status_code == 200

            for headers in ({}, {"Range": "bytes=0-9"}):  # of HEAD there are no ranges
                head = await client.head(url, headers=headers)
                assert (head.status_code, head.content) == (200, b"")
                for name in ("content-length", "content-type", "accept-ranges", "etag", "x-lumos-seed"):
                    assert head.headers[name] == whole.headers[name]
            picture = await client.get(url, params={"variant": "thumbnail"}, headers={"Range": "bytes=0-9"})
            assert (picture.status_code, picture.headers["content-type"]) == (200, "image/jpeg")
            await client.delete(f"/v1/videos/{video['id']}")
            assert (await client.head(url)).status_code == 404

    asyncio.run(main())


def test_a_completed_video_whose_file_is_gone_is_not_told_to_be_unfinished(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            video = await finished(client, (await post(client, {**PROMPT, "steps": 1}))["id"])
            for path in Path(config.jobs).rglob("*.mp4"):
                path.unlink()
            for variant in ("video", "thumbnail"):
                gone = await client.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
                assert (gone.status_code, gone.headers.get("retry-after")) == (404, None)
                assert f"the file of video {video['id']} is gone" in gone.json()["error"]["message"]

    asyncio.run(main())


def test_a_stored_video_that_is_damaged_is_told_to_be(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            video = await finished(client, (await post(client, {**PROMPT, "steps": 1}))["id"])
            (path,) = Path(config.jobs).rglob("*.mp4")
            whole = path.read_bytes()
            url, body = f"/v1/videos/{video['id']}/content", {"prompt": "x", "video": {"id": video["id"]}}
            for data in (
                b"",
                b"no video",
                whole[: len(whole) // 2],
                whole[:-200],
                encode_jpeg(np.zeros((8, 8, 3), np.uint8)),
            ):
                path.write_bytes(data)
                for answer in (
                    await client.get(url, params={"variant": "thumbnail"}),
                    await client.get(url, params={"variant": "spritesheet"}),
                    await client.post("/v1/videos/extensions", json={**body, "num_frames": 4}),
                ):
                    assert answer.status_code == 404, (len(data), answer.text)
                    assert f"the file of video {video['id']} is damaged" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_a_file_is_closed_as_its_client_leaves(tmp_path: Path) -> None:
    """In the middle of it, whether the server says so by a message or, as newer ones, by an error of its own."""
    (tmp_path / "files" / "job").mkdir(parents=True)
    (tmp_path / "files" / "job" / "video.mp4").write_bytes(bytes(1 << 20))

    def open_files() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{name}").endswith("video.mp4") for name in os.listdir("/proc/self/fd")
        )

    async def main(version: str) -> None:
        scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"version": "3.0", "spec_version": version}}
        answer = await file_answer(JobStore(str(tmp_path)), "job", "video.mp4", Request(scope), {}, "video/mp4")
        left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body":
                assert open_files() == 1
                left.set()
                if version == "2.4":
                    raise OSError("the client left")
                await asyncio.sleep(30)

        with suppress(Exception):  # ClientDisconnect
            await answer(scope, receive, send)

    for version in ("2.3", "2.4"):
        asyncio.run(asyncio.wait_for(main(version), 10))
        assert open_files() == 0


def test_a_file_that_is_deleted_while_it_is_sent_is_sent_whole(tmp_path: Path) -> None:
    async def main() -> bytes:
        store = JobStore(str(tmp_path))
        path = store.local_path("job", "video.mp4")
        assert path is not None
        Path(path).parent.mkdir(parents=True)
        Path(path).write_bytes(data)
        asked = Request({"type": "http", "method": "GET", "headers": [(b"range", b"bytes=5-")]})
        answer = await file_answer(store, "job", "video.mp4", asked, {}, "video/mp4")
        assert isinstance(answer, StreamingResponse)
        Path(path).unlink()
        return b"".join([bytes(piece) async for piece in answer.body_iterator if isinstance(piece, bytes)])

    data = bytes(range(256)) * 4096
    assert asyncio.run(main()) == data[5:]
