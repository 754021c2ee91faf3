"""Jobs over HTTP, in processes that end, whose store is a folder or S3."""

import asyncio
import base64
import errno
import io
import json
import threading
import time
from dataclasses import replace
from typing import Any

import av
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lumos.compression import VideoSize
from lumos.config import SamplingConfig, ShortcutConfig
from pipelines import storage
from pipelines.generation.config import ServeConfig
from pipelines.generation.generator import VideoGenerator
from pipelines.generation.model import read_card
from pipelines.generation.request import VideoRequest
from pipelines.generation.serving import api
from pipelines.generation.serving.jobs import JobStore, request_of, request_to_json
from pipelines.generation.serving.pictures import decode_frames
from pipelines.media import encode_video
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, finished, served, service_of
from tests.pipelines.generation.serving.test_store import job_of

pytestmark = pytest.mark.usefixtures("quick_looks")
PROMPT: dict[str, Any] = {"prompt": CAPTIONS[0], "seed": 7}
LONG = {"steps": 100, "frames": 33}


def test_a_request_comes_back_from_its_job_as_it_was() -> None:
    sampling = SamplingConfig(num_steps=4, shortcuts=ShortcutConfig(order="halton", frame_steps=(8, 4)))
    size = VideoSize(width=32, height=32, num_frames=9, fps=12.0)
    request = VideoRequest(prompt="\u00fcber \U0001f600", seed=2**62, size=size, sampling=sampling, motion=3)
    kept = json.loads(json.dumps(request_to_json(request)))
    assert request_of(job_of(request=kept)) == request


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    video: dict[str, Any] = answer.json()
    return video


def test_a_job_from_beginning_to_end_invariance_with_the_direct_answer(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            created = await client.post("/v1/videos", json=PROMPT)
            video = created.json()
            assert created.headers["openai-poll-after-ms"] == "500"
            assert (video["status"], video["progress"], video["object"]) == ("queued", 0, "video")
            assert (video["size"], video["seconds"], video["model"], video["seed"]) == ("32x32", "0.75", "export", 7)
            early = await client.get(f"/v1/videos/{video['id']}/content")
            assert early.status_code in (200, 409)
            done = await finished(client, video["id"])
            assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
            assert done["created_at"] <= done["completed_at"] < done["expires_at"]
            content = await client.get(f"/v1/videos/{video['id']}/content")
            direct = await client.post("/v1/videos/sync", json=PROMPT)
            assert content.content == direct.content
            for name in ("content-type", "x-lumos-seed", "x-lumos-config-hash", "content-disposition"):
                assert content.headers[name] == direct.headers[name]
            for variant, shape in (("thumbnail", (32, 32)), ("spritesheet", (96, 96))):
                picture = await client.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
                assert picture.headers["content-type"] == "image/jpeg"
                with av.open(io.BytesIO(picture.content)) as container:
                    assert next(container.decode(video=0)).to_ndarray(format="rgb24").shape[:2] == shape
            assert (await client.delete(f"/v1/videos/{video['id']}")).json()["deleted"] is True
            for answer in (
                await client.get(f"/v1/videos/{video['id']}"),
                await client.get("/v1/videos/video_x/content"),
            ):
                assert answer.status_code == 404

    asyncio.run(main())


def test_multipart_bodies_and_aliases_mean_the_same(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            fields = {
                "prompt": CAPTIONS[0],
                "seed": "7",
                "num_frames": "5",
                "num_inference_steps": "3",
                "size": "32x32",
            }
            form = await client.post("/v1/videos/sync", files={name: (None, value) for name, value in fields.items()})
            assert form.status_code == 200, form.text
            plain = await client.post("/v1/videos/sync", json={**PROMPT, "frames": 5, "steps": 3})
            by_time = await client.post("/v1/videos/sync", json={**PROMPT, "seconds": 5 / 12, "steps": 3})
            assert form.content == plain.content == by_time.content
            whole = await client.post("/v1/videos/sync", json={**PROMPT, "seconds": "1", "steps": 3})
            assert len(decode_frames(whole.content)) == 13  # the nearest to 12
            for data, kind, message in (
                (b"{}", "", "Content-Type is missing"),
                (
                    b"prompt=x",
                    "application/x-www-form-urlencoded",
                    "Content-Type is 'application/x-www-form-urlencoded'",
                ),
            ):
                bad = await client.post("/v1/videos", content=data, headers={"content-type": kind} if kind else {})
                assert bad.status_code == 415
                assert message in bad.json()["error"]["message"]
            bad = await client.post("/v1/videos", files={"prompt": ("a.txt", b"x")})
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "prompt")

    asyncio.run(main())


def png(width: int = 40, height: int = 24) -> bytes:
    frame = np.zeros((1, height, width, 3), np.uint8)
    frame[:, :, : width // 2] = (200, 30, 30)
    return encode_video(frame, 1.0, "png")


def test_a_video_begins_with_the_picture_or_clip_that_is_given(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            url = "data:image/png;base64," + base64.b64encode(png()).decode()
            usual = await client.post("/v1/videos/sync", json=PROMPT)
            as_text = await client.post("/v1/videos/sync", json={**PROMPT, "input_reference": url})
            as_object = await client.post("/v1/videos/sync", json={**PROMPT, "input_reference": {"image_url": url}})
            as_file = await client.post(
                "/v1/videos/sync",
                data={"prompt": CAPTIONS[0], "seed": "7"},
                files={"input_reference": ("a.png", png())},
            )
            assert as_text.status_code == 200, as_text.text
            assert as_text.content == as_object.content == as_file.content != usual.content
            as_job = await finished(client, (await post(client, {**PROMPT, "input_reference": url}))["id"])
            assert (await client.get(f"/v1/videos/{as_job['id']}/content")).content == as_text.content
            clip = await client.post(
                "/v1/videos/sync",
                data={"prompt": CAPTIONS[0], "seed": "7", "num_frames": "13"},
                files={"input_reference": ("clip.mp4", usual.content, "video/mp4")},
            )
            assert clip.status_code == 200, clip.text
            assert len(decode_frames(clip.content)) == 13

    asyncio.run(main())


def test_a_finished_video_is_gone_on_with(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            first = await finished(client, (await post(client, PROMPT))["id"])
            before = decode_frames((await client.get(f"/v1/videos/{first['id']}/content")).content)
            body = {"prompt": CAPTIONS[0], "video": {"id": first["id"]}, "num_frames": 4, "seed": 1}
            answer = await client.post("/v1/videos/extensions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["remixed_from_video_id"] == first["id"]
            longer = await finished(client, answer.json()["id"])
            assert (longer["num_frames"], longer["seconds"]) == (13, f"{13 / 12:.4g}")
            frames = decode_frames((await client.get(f"/v1/videos/{longer['id']}/content")).content)
            assert len(frames) == 13
            assert np.abs(frames[:9].astype(int) - before).mean() < 10  # noise, written once more
            odd = await client.post("/v1/videos/extensions", json={**body, "num_frames": 5})
            assert (odd.status_code, "use 4 or 8" in odd.text) == (400, True)
            gone = await client.post("/v1/videos/extensions", json={**body, "video": {"id": "video_nothing"}})
            assert gone.status_code == 404

    asyncio.run(main())


def test_events_show_each_latent_frame(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            video = await post(client, PROMPT)
            answer = await client.get(f"/v1/videos/{video['id']}/events")
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line.split(": ", 1) for line in answer.text.splitlines() if line]
            events = [(name[1], json.loads(data[1])) for name, data in zip(lines[::2], lines[1::2], strict=True)]
            progress = [value for name, value in events if name == "progress"]
            assert [(value["done"], value["total"]) for value in progress] == [(1, 3), (2, 3), (3, 3)]
            for value in progress:
                assert base64.b64decode(value["picture"]).startswith(b"\xff\xd8")
            assert events[-1][0] == "completed"
            assert events[-1][1]["progress"] == 100

    asyncio.run(main())


def test_several_videos_of_one_request_and_pages_of_jobs(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            first = await post(client, {**PROMPT, "n": 3})
            videos = [await finished(client, video_id) for video_id in first["ids"]]
            assert [video["seed"] for video in videos] == [7, 8, 9]
            assert first["id"] == first["ids"][0]
            seen: list[str] = []
            query: dict[str, Any] = {"limit": 2, "order": "asc"}
            while True:
                page = (await client.get("/v1/videos", params=query)).json()
                seen += [video["id"] for video in page["data"]]
                if not page["has_more"]:
                    break
                query["after"] = page["last_id"]
            assert seen == first["ids"]
            newest = (await client.get("/v1/videos", params={"limit": 1})).json()
            assert newest["data"][0]["id"] == first["ids"][-1]
            assert (await client.get("/v1/videos", params={"limit": 0})).status_code == 400

    asyncio.run(main())


def test_a_job_that_is_deleted_frees_the_model_also_through_another_process(anywhere: ServeConfig) -> None:
    async def main() -> None:
        card = read_card(anywhere)
        model = VideoGenerator(card, anywhere)
        models = {"export": served(anywhere, generator=model)}
        async with (
            service_of(anywhere, models, "one") as one,
            service_of(anywhere, models, "two") as two,
            client_to(one) as client,
            client_to(two) as other,
        ):
            for deleting in (client, other):
                video = await post(client, {**PROMPT, **LONG})
                while (await other.get(f"/v1/videos/{video['id']}")).json()["status"] == "queued":
                    await asyncio.sleep(0.02)
                assert (await deleting.delete(f"/v1/videos/{video['id']}")).status_code == 200
                async with asyncio.timeout(20):
                    while (await model.status())["running"]:
                        await asyncio.sleep(0.02)
                assert (await client.get(f"/v1/videos/{video['id']}")).status_code == 404

    asyncio.run(main())


def test_a_batch_goes_on_for_the_job_that_is_left_and_stops_when_all_are_deleted(config: ServeConfig) -> None:
    async def main() -> None:
        model = VideoGenerator(read_card(config), config)
        async with service_of(config, {"export": served(config, generator=model)}) as app, client_to(app) as client:
            first, second = (await post(client, {**PROMPT, **LONG, "n": 2}))["ids"]
            while (await model.status())["running"] < 2:
                await asyncio.sleep(0.02)
            await client.delete(f"/v1/videos/{first}")
            done = (await client.get(f"/v1/videos/{second}")).json()["progress"]
            while (video := (await client.get(f"/v1/videos/{second}")).json())["progress"] == done:
                await asyncio.sleep(0.02)
            assert video["status"] == "in_progress"
            await client.delete(f"/v1/videos/{second}")
            async with asyncio.timeout(20):
                while (await model.status())["running"]:
                    await asyncio.sleep(0.02)

    asyncio.run(main())


def test_a_job_whose_time_is_over_tells_the_time_that_it_had_and_what_sets_it(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(replace(config, job_timeout_s=0.5)) as app, client_to(app) as client:
            video = await finished(client, (await post(client, {**PROMPT, **LONG}))["id"])
            assert (video["status"], video["error"]["code"]) == ("failed", "timeout")
            assert "was not done within 0.5 s" in video["error"]["message"]
            assert "job_timeout_s" in video["error"]["message"]

    asyncio.run(main())


def test_jobs_of_a_service_that_ends_are_done_by_the_next_exactly_once(anywhere: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(anywhere) as app, client_to(app) as client:
            videos = [await post(client, {**PROMPT, "seed": seed, "steps": 20}) for seed in range(3)]
        async with service_of(anywhere) as app, client_to(app) as client:
            for video in videos:
                done = await finished(client, video["id"])
                assert done["status"] == "completed"
                direct = await client.post("/v1/videos/sync", json={**PROMPT, "seed": done["seed"], "steps": 20})
                assert (await client.get(f"/v1/videos/{video['id']}/content")).content == direct.content
                files = storage.list_names(f"{anywhere.jobs}/files/{video['id']}")
                assert len([name for name in files if name.startswith("video-")]) == 1

    asyncio.run(main())


def test_a_service_that_has_not_the_model_leaves_a_job_to_one_that_has(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            video = await post(client, {**PROMPT, "steps": 20})
        async with service_of(config, {"other": served(config)}) as app, client_to(app) as client:
            await asyncio.sleep(0.5)  # it looks for free jobs as it starts
            assert (await client.get(f"/v1/videos/{video['id']}")).json()["status"] in ("queued", "in_progress")
        async with service_of(config) as app, client_to(app) as client:
            assert (await finished(client, video["id"]))["status"] == "completed"

    asyncio.run(main())


def test_the_more_jobs_are_open_the_longer_pollers_are_told_to_wait(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            for _ in range(2):
                created = await client.post("/v1/videos", json={**PROMPT, **LONG, "n": 8})
            assert 500 < int(created.headers["openai-poll-after-ms"]) <= 800

    asyncio.run(main())


def test_a_process_that_ends_as_it_gives_a_sign_leaves_none(
    anywhere: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_sign, giving = JobStore.give_sign, threading.Event()

    def slow(store: JobStore, counts: bytes) -> None:
        giving.set()
        time.sleep(0.5)
        give_sign(store, counts)

    async def main() -> None:
        async with service_of(anywhere, worker="one"):
            monkeypatch.setattr(JobStore, "give_sign", slow)
            await asyncio.to_thread(giving.wait, 20)
        await asyncio.sleep(1.0)
        assert storage.list_names(f"{anywhere.jobs}/alive") == []  # its jobs are free at once

    asyncio.run(main())


def test_a_scrape_of_any_process_tells_of_the_whole_service(anywhere: ServeConfig) -> None:
    async def main() -> None:
        models = {"export": served(anywhere)}
        async with (
            service_of(anywhere, models, "one") as one,
            service_of(anywhere, models, "two") as two,
            client_to(one) as client,
            client_to(two) as other,
        ):
            for asked in (client, other, other):
                assert (await asked.post("/v1/images/generations", json=PROMPT)).status_code == 200
            for app in (client, other):  # as it is scraped, each tells what it has counted
                await app.get("/metrics")
            for app in (client, other):
                text = (await app.get("/metrics")).text
                metrics = {metric.name: metric for metric in text_string_to_metric_families(text)}
                tokens = {each.labels["process"]: each.value for each in metrics["lumos_tokens"].samples}
                assert tokens == {"one": 16, "two": 32}
                assert text.count("# TYPE lumos_tokens_total counter") == 1
                begins = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
                assert len(begins) == len(set(begins))  # all lines of a metric stand together
        async with service_of(anywhere, models, "three") as app, client_to(app) as client:
            assert 'process="one"' not in (await client.get("/metrics")).text

    asyncio.run(main())


def test_a_scrape_tells_of_its_own_process_where_the_store_fails(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "the disk fails")

    def hangs(*_: object) -> None:
        released.wait(20)

    released = threading.Event()
    monkeypatch.setattr(api, "_HEALTH_TIMEOUT_S", 0.5)

    async def main() -> None:
        async with service_of(config, worker="one") as app, client_to(app) as client:
            assert (await client.post("/v1/images/generations", json=PROMPT)).status_code == 200
            for trouble in (fails, hangs):
                with monkeypatch.context() as patch:
                    patch.setattr(JobStore, "give_sign", trouble)
                    scraped = await client.get("/metrics")
                assert scraped.status_code == 200
                assert 'lumos_tokens_total{model="export",process="one"} 16.0' in scraped.text
            released.set()

    asyncio.run(main())


def test_jobs_are_whose_token_made_them_and_rates_count_for_each_token(config: ServeConfig) -> None:
    async def main() -> None:
        limited = replace(config, token="red, blue", rate_per_minute=2)
        async with service_of(limited) as app, client_to(app) as client:
            red, blue = ({"Authorization": f"Bearer {token}"} for token in ("red", "blue"))
            video = (await client.post("/v1/videos", json=PROMPT, headers=red)).json()
            assert (await client.get(f"/v1/videos/{video['id']}", headers=red)).status_code == 200
            for answer in (
                await client.get(f"/v1/videos/{video['id']}", headers=blue),
                await client.delete(f"/v1/videos/{video['id']}", headers=blue),
                await client.get(f"/v1/videos/{video['id']}/content", headers=blue),
            ):
                assert answer.status_code == 404
            assert (await client.get("/v1/videos", headers=blue)).json()["data"] == []
            assert (await client.post("/v1/videos", json=PROMPT, headers=red)).status_code == 200
            third = await client.post("/v1/videos", json=PROMPT, headers=red)
            assert (third.status_code, third.json()["error"]["type"]) == (429, "rate_limit_error")
            assert 1 <= int(third.headers["retry-after"]) <= 31
            assert (await client.post("/v1/videos", json=PROMPT, headers=blue)).status_code == 200
            assert (await client.get("/metrics")).status_code == 401

    asyncio.run(main())


def test_images_models_metrics_health_and_documentation(config: ServeConfig) -> None:
    async def main() -> None:
        models = {"export": served(config), "other": served(config, "other")}
        async with service_of(config, models) as app, client_to(app) as client:
            body = {"prompt": CAPTIONS[0], "n": 2, "seed": 3, "model": "other"}
            images = (await client.post("/v1/images/generations", json=body)).json()
            assert [image["seed"] for image in images["data"]] == [3, 4]
            assert base64.b64decode(images["data"][0]["b64_json"]).startswith(b"\x89PNG")
            listed = (await client.get("/v1/models")).json()["data"]
            assert [(model["id"], model["object"]) for model in listed] == [("export", "model"), ("other", "model")]
            assert (await client.get("/v1/models/nothing")).status_code == 404
            assert (await finished(client, (await post(client, {**PROMPT, "model": "other"}))["id"]))[
                "model"
            ] == "other"
            metrics = (await client.get("/metrics")).text
            for line in (
                'lumos_tokens_total{model="other"',
                'lumos_video_seconds_count{frames="9",model="other"',
                'path="/v1/images/generations",',
                "lumos_batch_size_bucket",
                "lumos_jobs_open",
            ):
                assert line in metrics
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).json() == {"status": "ok", "queued": 0, "running": 0}
            page = (await client.get("/docs")).text
            assert "https://" not in page
            for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
                assert f"/docs/static/{name}" in page
                assert (await client.get(f"/docs/static/{name}")).status_code == 200
            answer = await client.get("/health", headers={"X-Request-Id": "mine-1"})
            assert answer.headers["x-request-id"] == "mine-1"

    asyncio.run(main())
