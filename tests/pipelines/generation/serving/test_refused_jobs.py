"""What is not taken in as a job, and what is left of it: nothing."""

import asyncio
import base64
import errno
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from lumos.compression import VideoSize
from pipelines import storage
from pipelines.generation.config import ServeConfig, SizeConfig
from pipelines.generation.serving import service, videos
from pipelines.generation.serving.jobs import Job, JobStore, Version
from pipelines.generation.serving.pictures import decode_frames
from tests.pipelines.decoding.test_given import AVIF
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, finished, service_of
from tests.pipelines.generation.serving.test_jobs import LONG, PROMPT, png, post

pytestmark = pytest.mark.usefixtures("quick_looks")


def test_too_many_jobs_are_refused_and_none_of_a_request_is_taken_then(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(replace(anywhere, max_jobs=2)) as app, client_to(app) as client:
            await post(client, {**PROMPT, **LONG})
            refused = await client.post("/v1/videos", json={**PROMPT, "n": 2})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert len((await client.get("/v1/videos")).json()["data"]) == 1

    asyncio.run(main())


def test_more_videos_than_may_ever_be_open_are_not_put_off_but_refused(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(replace(config, max_jobs=4, api_replicas=2)) as app, client_to(app) as client:
            refused = await client.post("/v1/videos", json={**PROMPT, "n": 3})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
            assert "at most 2" in refused.json()["error"]["message"]
            await post(client, {**PROMPT, "n": 2})

    asyncio.run(main())


def test_a_picture_of_a_service_that_writes_png_is_not_gone_on_with_as_png(config: ServeConfig) -> None:
    async def main() -> None:
        pictures = replace(config, format="png", video=SizeConfig(num_frames=1))
        async with service_of(pictures) as app, client_to(app) as client:
            first = await finished(client, (await post(client, PROMPT))["id"])
            body = {"prompt": CAPTIONS[0], "video": {"id": first["id"]}, "num_frames": 4, "seed": 1}
            refused = await client.post("/v1/videos/extensions", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "num_frames")
        async with service_of(config) as app, client_to(app) as client:  # which writes mp4
            longer = await finished(client, (await client.post("/v1/videos/extensions", json=body)).json()["id"])
            content = await client.get(f"/v1/videos/{longer['id']}/content")
            assert (content.headers["content-type"], len(decode_frames(content.content))) == ("video/mp4", 5)

    asyncio.run(main())


def test_a_clip_to_go_on_with_is_not_decoded_where_so_much_cannot_be_added(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[VideoSize] = []
    monkeypatch.setattr(service, "read_clip", lambda data, size, limits: sizes.append(size))

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            refused = await client.post(
                "/v1/videos/extensions",
                data={"prompt": CAPTIONS[0], "num_frames": "100000"},
                files={"video": ("clip.mp4", b"....ftyp", "video/mp4")},
            )
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "num_frames")
            assert sizes == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "field", "words"),
    [
        ("/v1/videos", "input_reference", "send it with its own media type"),
        ("/v1/videos/extensions", "video", "it is the input_reference of POST /v1/videos"),
    ],
)
def test_a_picture_is_no_clip(config: ServeConfig, path: str, field: str, words: str) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            files = {field: ("photo.mp4", png(), "video/mp4")}
            refused = await client.post(path, data={"prompt": CAPTIONS[0]}, files=files)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
            assert f"{field}: it is no video: a picture (png)" in refused.json()["error"]["message"]
            assert words in refused.json()["error"]["message"]

    asyncio.run(main())


def test_an_avif_is_taken_for_the_picture_it_is(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            for kind in ("image/avif", "application/octet-stream"):
                files = {"input_reference": ("photo.avif", AVIF, kind)}
                taken = await client.post("/v1/videos", data={"prompt": CAPTIONS[0], "steps": "1"}, files=files)
                assert (taken.status_code, taken.json()["num_given"]) == (200, 1), taken.text

    asyncio.run(main())


def test_a_video_does_not_grow_without_end(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extension decodes the whole, in the process that answers all clients."""
    monkeypatch.setattr(videos, "_MAX_SECONDS", 13 / 12)

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            video = await finished(client, (await post(client, PROMPT))["id"])  # of 9 frames, 12 a second
            body = {"prompt": CAPTIONS[0], "video": {"id": video["id"]}, "num_frames": 4}
            longest = await finished(client, (await client.post("/v1/videos/extensions", json=body)).json()["id"])
            monkeypatch.setattr(videos.pictures, "decode_frames", lambda _: pytest.fail("it was decoded"))
            body["video"] = {"id": longest["id"]}
            refused = await client.post("/v1/videos/extensions", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "video")
            assert "it would last 1.417 s, of 1.08333 s at most" in refused.json()["error"]["message"]

    asyncio.run(main())


def test_clients_that_leave_do_not_make_room_for_more_decoders(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is decoded to its end, or for 20 s, by a process of up to 1.5 GB, whether its client waits or not."""
    decoding, released = threading.Semaphore(0), threading.Event()

    def read_image(data: bytes, size: VideoSize, limits: object) -> np.ndarray:
        decoding.release()
        released.wait(20)
        return np.zeros((1, size.height, size.width, 3), np.uint8)

    monkeypatch.setattr(service, "read_image", read_image)
    body = {**PROMPT, "input_reference": "data:image/png;base64," + base64.b64encode(png()).decode()}

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            for _ in range(2):
                leaving = asyncio.create_task(client.post("/v1/videos", json=body))
                assert await asyncio.to_thread(decoding.acquire, timeout=10)
                leaving.cancel()
            waiting = asyncio.create_task(client.post("/v1/videos", json=body))
            assert not await asyncio.to_thread(decoding.acquire, timeout=0.5)
            released.set()
            assert (await waiting).status_code == 200

    asyncio.run(main())


def test_where_the_store_fails_none_of_several_jobs_stays_as_the_client_will_ask_again(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = JobStore.create, itertools.count()

    def failing(store: JobStore, job: Job) -> Version:
        if next(calls) == 1:
            raise OSError(errno.EIO, "the disk fails")
        return create(store, job)

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            with monkeypatch.context() as patch:
                patch.setattr(JobStore, "create", failing)
                refused = await client.post("/v1/videos", json={**PROMPT, "n": 3})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert (await client.get("/v1/videos")).json()["data"] == []
            assert storage.list_names(f"{config.jobs}/files") == []
            again = await post(client, {**PROMPT, "n": 3})
            assert [(await finished(client, name))["status"] for name in again["ids"]] == ["completed"] * 3

    asyncio.run(main())


def test_none_of_several_jobs_stays_where_the_store_fails_for_a_while(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = JobStore.create, itertools.count()

    def failing(store: JobStore, job: Job) -> Version:
        if next(calls) >= 1:
            raise OSError(errno.EIO, "the disk fails")
        return create(store, job)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "the disk fails")

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            with monkeypatch.context() as patch:
                patch.setattr(JobStore, "create", failing)
                patch.setattr(JobStore, "delete", fails)
                refused = await client.post("/v1/videos", json={**PROMPT, **LONG, "n": 3})
                assert refused.status_code == 503
            async with asyncio.timeout(10):
                while (await client.get("/v1/videos")).json()["data"] or storage.list_names(f"{config.jobs}/files"):
                    await asyncio.sleep(0.05)
            assert "lumos_jobs_total{" not in (await client.get("/metrics")).text  # nothing was done of them

    asyncio.run(main())
