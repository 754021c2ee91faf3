"""How much of a video is gone on from."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from pipelines.generation.config import ServeConfig
from pipelines.media import encode_video
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, finished, service_of
from tests.pipelines.generation.serving.test_jobs import PROMPT, png, post
from tests.pipelines.generation.test_run import copy_model

pytestmark = pytest.mark.usefixtures("quick_looks")
URL = "/v1/videos/extensions"
CLIP = ("clip.mp4", encode_video(np.zeros((33, 32, 32, 3), np.uint8), 12.0), "video/mp4")


@pytest.mark.parametrize(
    ("added", "max_cells", "given", "given_of_clip"),
    [(4, None, 9, 13), (8, None, 9, 9), (12, None, 5, 5), (16, None, 1, 1), (20, None, 1, 1), (4, 64, 9, 9)],
)
def test_an_extension_goes_on_from_what_the_longest_trained_length_and_the_service_leave(
    config: ServeConfig,
    model_dir: Path,
    tmp_path: Path,
    added: int,
    max_cells: int | None,
    given: int,
    given_of_clip: int,
) -> None:
    # At this size 9 and 17 frames.
    model = copy_model(model_dir, tmp_path / "model", info={"shapes": [[3, 4, 4], [5, 4, 4], [9, 2, 2], [1, 4, 4]]})

    async def main() -> None:
        service = replace(config, model=str(model), max_cells=max_cells)
        async with service_of(service) as app, client_to(app) as client:
            video = await finished(client, (await post(client, {**PROMPT, "steps": 1}))["id"])
            body = {"prompt": CAPTIONS[0], "num_frames": added, "video": {"id": video["id"]}}
            longer = await client.post(URL, json=body)
            assert longer.status_code == 200, longer.text
            assert (longer.json()["num_given"], longer.json()["num_frames"]) == (given, 9 + added)
            form = {"prompt": CAPTIONS[0], "num_frames": str(added), "steps": "1"}
            of_clip = await client.post(URL, data=form, files={"video": CLIP})
            assert of_clip.status_code == 200, of_clip.text
            assert of_clip.json()["num_given"] == given_of_clip

    asyncio.run(main())


def test_num_given_begins_a_video_with_as_much_of_a_clip_as_an_extension_did(config: ServeConfig) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
    clip = ("clip.mp4", encode_video(noise, 12.0), "video/mp4")

    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            form = {"prompt": CAPTIONS[0], "num_frames": "4", "steps": "1", "seed": "3"}
            made = (await client.post(URL, data=form, files={"video": clip})).json()
            assert (made["num_given"], made["num_frames"], made["motion"]) == (5, 9, None)
            await finished(client, made["id"])
            content = (await client.get(f"/v1/videos/{made['id']}/content")).content
            again = form | {"num_frames": "9"}
            for more, alike in (({}, False), ({"num_given": "5"}, True)):
                answer = await client.post("/v1/videos/sync", data=again | more, files={"input_reference": clip})
                assert (answer.content == content) == alike, answer.text
            short, picture = ("c.mp4", encode_video(noise[:2], 12.0), "video/mp4"), ("a.png", png())
            for given, file, field, words in (
                ("9", clip, "num_given", "less than the 9 frames of the video"),
                ("4", clip, "num_given", "must be 1 + 4k"),
                ("5", short, "input_reference", "it has 2 frames at 12 fps, and num_given is 5"),
                ("5", picture, "num_given", "a picture is 1 frame"),
                ("1", (None, ""), "input_reference", "is no data: URL"),
            ):
                wrong = {"prompt": "x", "num_given": given}
                refused = await client.post("/v1/videos", data=wrong, files={"input_reference": file})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text
                assert words in refused.json()["error"]["message"]
            refused = await client.post("/v1/videos", json={"prompt": "x", "num_given": 1})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "num_given")
            form = {"prompt": "x", "num_given": "1"}
            one = await client.post("/v1/videos", data=form, files={"input_reference": picture})
            assert one.json()["num_given"] == 1

    asyncio.run(main())


@pytest.mark.parametrize(("untrained_sizes", "status"), [("warn", 200), ("refuse", 400)])
def test_an_extension_longer_than_any_trained_video_is_told_or_refused(
    config: ServeConfig, untrained_sizes: Literal["warn", "refuse"], status: int
) -> None:
    async def main() -> None:
        service = replace(config, untrained_sizes=untrained_sizes)
        async with service_of(service) as app, client_to(app) as client:
            form = {"prompt": CAPTIONS[0], "num_frames": "20", "steps": "1"}
            longer = await client.post(URL, data=form, files={"video": CLIP})
            assert longer.status_code == status
            why = longer.headers["X-Lumos-Warning"] if status == 200 else longer.json()["error"]["message"]
            assert "32x32, 21 frames at 12 fps is no size that the model was trained on" in why
            usual = await client.post(URL, data=form | {"num_frames": "4"}, files={"video": CLIP})
            assert (usual.status_code, usual.headers.get("X-Lumos-Warning")) == (200, None)

    asyncio.run(main())


def test_the_interface_tells_how_much_is_gone_on_from(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            schema = (await client.get("/openapi.json")).json()
            assert "from the last frame alone" in schema["paths"][URL]["post"]["description"]
            assert "num_given" in schema["components"]["schemas"]["ExtensionBody"]["description"]

    asyncio.run(main())


def test_a_clip_is_refused_by_a_model_that_names_no_size(config: ServeConfig, model_dir: Path, tmp_path: Path) -> None:
    model = copy_model(model_dir, tmp_path / "model", info={"shapes": [], "fps": None})

    async def main() -> None:
        async with service_of(replace(config, model=str(model))) as app, client_to(app) as client:
            refused = await client.post(URL, data={"prompt": CAPTIONS[0]}, files={"video": CLIP})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "video")
            assert "input_reference of POST /v1/videos" in refused.json()["error"]["message"]

    asyncio.run(main())


def test_rates_are_compared_as_shards_hold_them_and_one_that_is_untrained_is_told(
    config: ServeConfig, model_dir: Path, tmp_path: Path
) -> None:
    model = copy_model(model_dir, tmp_path / "model", info={"fps": float(np.float32(23.976))})

    async def main() -> None:
        strict = replace(config, model=str(model), untrained_sizes="refuse")
        async with service_of(strict) as app, client_to(app) as client:
            assert (await client.post("/v1/videos", json={**PROMPT, "fps": 23.976, "steps": 1})).status_code == 200
            refused = await client.post("/v1/videos", json={**PROMPT, "fps": 12, "num_frames": 9})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "fps")
            assert "at 12 fps is no rate that the model was trained on" in refused.json()["error"]["message"]

    asyncio.run(main())


def test_numbers_that_a_client_did_not_write_are_explained(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            refused = await client.post("/v1/videos", json={**PROMPT, "seconds": 5000})
            assert "seconds: num_frames 60001 at 12 fps last longer than" in refused.json()["error"]["message"]
            form = {"prompt": CAPTIONS[0], "num_frames": "60000"}
            refused = await client.post(URL, data=form, files={"video": CLIP})
            assert refused.json()["error"]["param"] == "num_frames"
            assert "60000 frames to add to one are too many: num_frames 60001" in refused.json()["error"]["message"]

    asyncio.run(main())
