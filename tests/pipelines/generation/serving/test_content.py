"""Ranges of a video, as browsers ask for them to play from any place: alike from a folder and from S3."""

import asyncio

import pytest

from pipelines.generation.config import ServeConfig
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
