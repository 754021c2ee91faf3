"""What whoever runs a service sees of it, and what its clients cannot do to that."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.generation.config import ServeConfig
from pipelines.generation.serving.api import build_api
from pipelines.generation.serving.jobs import JobStore
from pipelines.generation.serving.observe import log_to
from tests.pipelines.generation.conftest import CAPTIONS
from tests.pipelines.generation.serving.in_process import client_to, served, service_of


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


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    handler = log_to(str(tmp_path / "log"), "one")
    yield tmp_path / "log" / "one.jsonl"
    logging.getLogger("pipelines.generation").removeHandler(handler)
    handler.close()


def logged_ids(log: Path) -> list[str]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line["request_id"] for line in lines if line["logger"] == "access"]


def test_an_answer_and_the_log_name_one_id_whatever_the_client_sends(config: ServeConfig, log: Path) -> None:
    async def main() -> None:
        async with service_of(config) as app, client_to(app) as client:
            for given in ("mine-1", "x" * 64, "no spaces", "x" * 65, "", "\u00e9".encode(), b"\xe9", None):
                headers = [] if given is None else [("x-request-id", given)]
                answer = await client.get("/health", headers=headers)
                (name,) = answer.headers.get_list("x-request-id")
                assert name == given or re.fullmatch("[0-9a-f]{16}", name), given
                assert (name == given) == (given in ("mine-1", "x" * 64))
                assert logged_ids(log)[-1] == name
            twice = await client.get("/health", headers=[("x-request-id", "one"), ("x-request-id", "two")])
            assert twice.headers.get_list("x-request-id") == logged_ids(log)[-1:]

    asyncio.run(main())


def test_the_log_names_the_id_that_a_proxy_before_us_tells(config: ServeConfig, log: Path) -> None:
    """As Ray Serve's does, where whoever started it did not hand it our middleware."""

    async def main() -> None:
        app = build_api({"export": served(config)}, config, JobStore(config.jobs), tells_id=False)
        async with client_to(app) as client:
            for given in ("mine-1", "no spaces"):
                answer = await client.get("/health", headers={"x-request-id": given})
                assert "x-request-id" not in answer.headers
        assert logged_ids(log) == ["mine-1", "no spaces"]

    asyncio.run(main())
