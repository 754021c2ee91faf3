"""What whoever runs a service sees of it, and what its clients cannot do to that."""

import asyncio
import re

from pipelines.generation.config import ServeConfig
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, service_of


def test_what_clients_ask_for_makes_no_series_beyond_the_sizes_that_are_served(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            for asked in ({}, {"size": "16x16"}, {"size": "48x16", "frames": 5}, {"size": "16x48", "frames": 13}):
                body = {"prompt": CAPTIONS[0], "steps": 1, "guidance_scale": 1.0, **asked}
                answer = await client.post("/v1/videos/sync", json=body)
                assert answer.status_code == 200, answer.text
            await client.post("/v1/images/generations", json={"prompt": CAPTIONS[0], "steps": 1})
            for method in ("BREW", "MAKE"):
                assert (await client.request(method, "/v1/videos")).status_code == 405
            text = (await client.get("/metrics")).text
            for metric in ("lumos_video_seconds", "lumos_queue_seconds"):
                lines = [line for line in text.splitlines() if line.startswith(f"{metric}_count")]
                counts = {tuple(re.findall(r'(?:frames|size)="(\w+)"', line)): line.split()[-1] for line in lines}
                assert counts == {
                    ("9", "32x32"): "1.0",
                    ("9", "other"): "1.0",
                    ("other", "other"): "2.0",
                    ("1", "32x32"): "1.0",
                }
            assert 'method="other"' in text
            assert "BREW" not in text

    asyncio.run(main())
