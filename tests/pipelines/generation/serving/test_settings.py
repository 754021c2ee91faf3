"""What a request says of how its video is drawn, and what becomes of it."""

import asyncio
import json

import pytest

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from pipelines.generation.config import MAX_SEED, ServeConfig
from pipelines.generation.request import VideoRequest
from pipelines.generation.serving.jobs import JobStore, new_id, request_to_json
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, finished, service_of
from tests.pipelines.generation.serving.test_jobs import PROMPT, post
from tests.pipelines.generation.serving.test_store import job_of

pytestmark = pytest.mark.usefixtures("quick_looks")


def test_shortcuts_and_the_temperature_of_the_draw_are_asked_for_per_request(config: ServeConfig) -> None:
    """Each way of writing them draws one video, which is not the full sampler's; `{}` is."""

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            usual = await post(client, {**PROMPT, "steps": 6})
            assert (usual["shortcuts"], usual["draw_temperature"]) == (None, 1.0)
            hot = await post(client, {**PROMPT, "steps": 6, "temperature": 3.0})
            assert (usual["temperature"], hot["temperature"]) == (1.0, 3.0)
            assert hot["config_hash"] != usual["config_hash"]
            full = await post(client, {**PROMPT, "steps": 6, "shortcuts": {}})
            assert (full["shortcuts"], full["config_hash"]) == (None, usual["config_hash"])

            asked = {"order": "halton", "frame_steps": [6, 2]}
            fields = {"prompt": CAPTIONS[0], "seed": "7", "draw_temperature": "0.5"}

            def form(**more: str) -> dict[str, tuple[None, str]]:
                return {name: (None, value) for name, value in (fields | more).items()}

            ways = [
                await client.post("/v1/videos", json={**PROMPT, "shortcuts": asked, "draw_temperature": 0.5}),
                await client.post("/v1/videos", files=form(shortcuts=json.dumps(asked))),
            ]
            assert [way.status_code for way in ways] == [200, 200], [way.text for way in ways]
            videos = [await finished(client, way.json()["id"]) for way in ways]
            for video in videos:
                assert (video["shortcuts"], video["draw_temperature"]) == (asked, 0.5)
            assert videos[0]["config_hash"] == videos[1]["config_hash"] != usual["config_hash"]
            await finished(client, usual["id"])
            files = [(await client.get(f"/v1/videos/{video['id']}/content")).content for video in (*videos, usual)]
            assert files[0] == files[1] != files[2]

            brackets = form(**{"shortcuts[order]": "halton", "shortcuts[context_refresh]": "2"})
            assert (await client.post("/v1/videos", files=brackets)).json()["shortcuts"] == {
                "order": "halton",
                "context_refresh": 2,
            }
            items = [*form(**{"shortcuts[order]": "halton"}).items()]
            # As openai's client writes a list.
            items += [("shortcuts[frame_steps][]", (None, text)) for text in ("6", "2")]
            assert (await client.post("/v1/videos", files=items)).json()["shortcuts"] == asked
            for wrong, words in (
                ({"ordr": "halton"}, "unknown field 'ordr' of shortcuts; known: order, threshold, guidance_interval"),
                ({"threshold": 2.0}, "shortcuts.threshold: Input should be less than or equal to 1, got 2.0"),
                ({"order": "halton", "threshold": 0.5}, "shortcuts: threshold is 0.5 with order halton"),
                ({"frame_steps": [10_000]}, "frame_steps holds 10000; this service allows at most"),
                ("halton", "shortcuts: it must be an object of order, threshold"),
            ):
                refused = await client.post("/v1/videos", json={**PROMPT, "shortcuts": wrong})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, "shortcuts")
                assert words in refused.json()["error"]["message"]
            refused = await client.post("/v1/videos", json={**PROMPT, "steps": 6, "shortcuts": asked})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steps")
            assert (await client.get("/v1/models")).json()["data"][0]["defaults"]["shortcuts"] is None

    asyncio.run(main())


def test_a_job_of_a_newer_program_is_listed_and_not_drawn_otherwise_than_it_says(config: ServeConfig) -> None:
    async def main() -> None:
        size = VideoSize(width=32, height=32, num_frames=9, fps=12.0)
        asked = request_to_json(VideoRequest(prompt="x", seed=1, size=size, sampling=SamplingConfig(num_steps=1)))
        store = JobStore(config.jobs, "newer")
        store.create(job_of(request={**asked, "mood": "calm"}, model="export", total=3))
        damaged = new_id(2.0)
        store.create(job_of(id=damaged, request={"prompt": "x"}))
        async with service_of(config) as app, client_to(app) as client:
            assert (await client.get(f"/v1/videos/{damaged}")).status_code == 404
            [listed] = (await client.get("/v1/videos")).json()["data"]
            failed = await finished(client, listed["id"])
            assert failed["status"] == "failed"
            assert "a newer program made this job: mood is not known here" in failed["error"]["message"]

    asyncio.run(main())


def test_the_last_seeds_are_as_good_as_others(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            made = await post(client, {**PROMPT, "seed": MAX_SEED - 1, "n": 2, "steps": 1})
            assert made["seed"] == MAX_SEED - 1
            refused = await client.post("/v1/videos", json={**PROMPT, "seed": MAX_SEED, "n": 2})
            assert refused.json()["error"]["param"] == "seed"

    asyncio.run(main())
