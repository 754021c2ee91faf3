"""The page at /, used in a real browser as a person would, over the real service and a small model."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipelines.generation.config import BatchConfig, ServeConfig
from pipelines.media import encode_video
from tests.chromium import Tab, chromium, needs_chromium
from tests.pipelines.generation.serving.in_process import client_to, listening, service_of
from tests.pipelines.generation.serving.test_jobs import png

HOSTILE = """<img src=x onerror="document.title='owned'"> it's a "red" $HOME `square` \\ 🟥"""
OPEN = ".tile[data-status=queued], .tile[data-status=in_progress]"
DONE = ".tile[data-status=completed] video"


@pytest.fixture
def config(serve_config: ServeConfig, tmp_path: Path) -> ServeConfig:
    batch = BatchConfig(max_size=2, wait_ms=5.0, max_queued=16)
    return replace(serve_config, jobs=str(tmp_path / "jobs"), batch=batch)


def test_files_are_served_to_all_and_name_no_other_host_and_no_way_for_strangers_text(config: ServeConfig) -> None:
    async def main() -> None:
        async with service_of(replace(config, token="sesame")) as app, client_to(app) as client:
            page = await client.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            paths = set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.text))
            assert {"page/house.css", "page/page.css", "page/page.js"} <= paths
            scripts = (await client.get("/page/page.js")).text + (await client.get("/page/tile.js")).text
            paths |= {f"page/{name}" for name in re.findall(r'from "\./([a-z.]+)"', scripts)}
            assert len(paths) == 6
            for path in ("", *paths):
                answer = await client.get(f"/{path}")
                assert answer.status_code == 200
                policy = answer.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert "frame-ancestors 'none'" in policy
                assert "http" not in policy
                if path.endswith(".js"):
                    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
                assert not re.findall(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write", answer.text)
            assert (await client.get("/page/../api.py")).status_code == 404
            assert "/page" not in (await client.get("/openapi.json")).text

    asyncio.run(main())


Story = Callable[[Tab, httpx.AsyncClient], Awaitable[None]]


def visit(config: ServeConfig, story: Story) -> None:
    """Let somebody do something with the page of a service; the browser must have nothing to complain of."""

    async def main(url: str) -> None:
        headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
        async with chromium() as tab, httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            await tab.resize(1280, 900)
            await tab.open(url)
            await story(tab, client)
            assert tab.complaints == []
            foreign = [asked for asked in tab.requested if not asked.startswith((url, "data:", f"blob:{url}"))]
            assert foreign == []

    with listening(config) as url:
        asyncio.run(main(url))


async def fill(tab: Tab, form: str, **values: object) -> None:
    for name, value in values.items():
        await tab.run(
            f"(input => {{ input.value = {str(value)!r};"
            "for (const name of ['input', 'change']) input.dispatchEvent(new Event(name, {bubbles: true})); })"
            f"(document.querySelector('#{form} [name={name}]'))"
        )


async def ask_for(tab: Tab, prompt: str, **values: object) -> None:
    await tab.until("document.querySelector('#about').textContent.includes('parameters')")
    await fill(tab, "make", **values)
    await tab.run("document.querySelector('#make textarea').select()")
    await tab.type(prompt)
    await tab.press("Enter", modifiers=2)


async def count(tab: Tab, selector: str, number: int) -> None:
    await tab.until(f"document.querySelectorAll('{selector}').length === {number}")


async def press(tab: Tab, text: str, within: str = "#groups") -> None:
    await tab.run(
        f"(b => {{ b.focus(); b.click(); }})([...document.querySelectorAll('{within} button')]"
        f".find(b => b.textContent === '{text}'))"
    )


async def jobs(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await client.get("/v1/videos", params={"order": "asc"})).json()["data"]
    return found


async def repeated(tab: Tab, folder: Path) -> tuple[str, str]:
    """The lines that make the newest video again."""
    await press(tab, "Repeat")
    await tab.until("document.querySelector('#repeat').open && !document.querySelector('#lines').hidden")
    lines = [str(await tab.run(f"document.querySelector('#{name}').textContent")) for name in ("curl", "python")]
    await tab.press("Escape")
    await tab.until("!document.querySelector('#repeat').open")
    assert "sesame" not in lines[0] + lines[1]
    folder.mkdir()
    return lines[0], lines[1]


async def output_of(command: list[str], folder: Path) -> bytes:
    """The video that a command writes."""
    environment = {**os.environ, "LUMOS_TOKEN": "sesame"}
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = folder.glob("*.mp4")
    data = path.read_bytes()
    path.unlink()
    return data


@needs_chromium
def test_videos_are_made_compared_repeated_and_continued_with_a_token(config: ServeConfig, tmp_path: Path) -> None:
    async def story(tab: Tab, client: httpx.AsyncClient) -> None:
        await tab.until("document.activeElement.name === 'token'")
        await tab.type("wrong")
        await tab.press("Enter")
        await tab.until("document.querySelector('#token .problem').textContent.includes('not accepted')")
        await tab.type("sesame")
        await tab.press("Enter")
        await tab.until("document.activeElement.name === 'prompt'")
        assert await tab.run("[localStorage.length, Object.keys(sessionStorage)]") == [0, ["lumos-token"]]

        await tab.run(
            "new MutationObserver(() => { window.pictures = (window.pictures ?? 0) + "
            "document.querySelectorAll('.tile img[src^=\"data:image/jpeg\"]').length; })"
            ".observe(document.querySelector('#groups'), {childList: true, subtree: true})"
        )
        await ask_for(tab, HOSTILE, n=3, seed=2**62 + 1)
        await count(tab, DONE, 3)
        assert await tab.run("window.pictures") > 0  # latent frames were seen on the way
        assert await tab.run("document.querySelector('.group h3').textContent") == HOSTILE
        assert await tab.run("[document.querySelectorAll('[onerror]').length, document.title]") == [
            0,
            "Lumos-1: make videos",
        ]
        made = await jobs(client)
        assert [video["prompt"] for video in made] == [HOSTILE] * 3
        names = await tab.run("[...document.querySelectorAll('.tile b')].map(b => b.textContent)")
        assert names == [f"Seed {video['seed']}" for video in made] == [f"Seed {2**62 + n}" for n in (1, 2, 3)]
        await tab.until("!document.querySelector('.together').hidden")

        content = (await client.get(f"/v1/videos/{made[0]['id']}/content")).content
        curl, python = await repeated(tab, tmp_path / "first")
        assert await output_of(["bash", "-c", curl], tmp_path / "first") == content
        assert await output_of([sys.executable, "-c", python], tmp_path / "first") == content
        await client.delete(f"/v1/videos/{(await jobs(client))[-1]['id']}")  # what that line made

        await press(tab, "Continue")
        await tab.until("document.querySelector('#continue').open")
        await fill(tab, "continue", num_frames=4, seed=5)
        await press(tab, "Go on", "#continue")
        await count(tab, DONE, 4)
        assert not await tab.run("document.querySelector('#continue').open")
        longer = (await jobs(client))[-1]
        assert (longer["remixed_from_video_id"], longer["num_frames"], longer["seed"]) == (made[0]["id"], 13, 5)
        _, python = await repeated(tab, tmp_path / "longer")
        content = (await client.get(f"/v1/videos/{longer['id']}/content")).content
        assert await output_of([sys.executable, "-c", python], tmp_path / "longer") == content

    visit(replace(config, token="sesame"), story)


@needs_chromium
def test_a_picture_to_start_from_is_sent_and_told(config: ServeConfig, tmp_path: Path) -> None:
    async def story(tab: Tab, client: httpx.AsyncClient) -> None:
        await tab.until("document.querySelector('#about').textContent.includes('parameters')")
        (tmp_path / "it's a start.png").write_bytes(png())
        await tab.choose_file("[name=input_reference]", tmp_path / "it's a start.png")
        await tab.until("document.querySelector('#given').naturalWidth === 40")
        await ask_for(tab, "a red square", seed=3)
        await count(tab, DONE, 1)
        (video,) = await jobs(client)
        assert video["num_given"] == 1
        assert "starts from a picture" in await tab.run("document.querySelector('.group').innerText")
        curl, python = await repeated(tab, tmp_path / "again")
        content = (await client.get(f"/v1/videos/{video['id']}/content")).content
        (tmp_path / "again" / "it's a start.png").write_bytes(png())
        assert await output_of(["bash", "-c", curl], tmp_path / "again") == content
        assert await output_of([sys.executable, "-c", python], tmp_path / "again") == content
        await tab.run("document.querySelector('#drop').click()")
        assert await tab.run("document.querySelector('[name=input_reference]').files.length") == 0

        # Of a clip an extension takes another number of frames than a video that begins with it.
        noise = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
        form, clip = {"prompt": "x", "num_frames": "4", "seed": "9"}, encode_video(noise, 12.0)
        made = await client.post("/v1/videos/extensions", data=form, files={"video": ("c.mp4", clip, "video/mp4")})
        await tab.open(str(client.base_url))
        await count(tab, ".tile[data-status=completed]", 3)  # the second by Python
        curl, _ = await repeated(tab, tmp_path / "clip")
        assert "clip again, which CLIP stands for" in await tab.run("document.querySelector('#note').textContent")
        (tmp_path / "clip" / "CLIP").write_bytes(clip)
        content = (await client.get(f"/v1/videos/{made.json()['id']}/content")).content
        assert await output_of(["bash", "-c", curl], tmp_path / "clip") == content

    visit(config, story)


@needs_chromium
def test_many_jobs_leave_the_page_able_to_cancel_and_delete_and_earlier_ones_are_listed(config: ServeConfig) -> None:
    async def story(tab: Tab, client: httpx.AsyncClient) -> None:
        # More streams of events than a browser opens connections would leave none for anything else.
        await ask_for(tab, "a red square", n=8, num_frames=33, num_inference_steps=200)
        await count(tab, OPEN, 8)
        await tab.until("/draws \\d now and \\d waits?/.test(document.querySelector('#queue').textContent)")
        await tab.until("document.querySelector('#groups').innerText.includes('of yours before it')")
        for left in range(7, -1, -1):
            await press(tab, "Cancel")
            await count(tab, OPEN, left)
        assert await jobs(client) == []
        assert await tab.run("document.activeElement.id") == "videos"
        await tab.until("!document.querySelector('#empty').hidden")

        for seed in range(14):
            body = {"prompt": "a blue circle", "seed": seed, "frames": 5, "steps": 2}
            assert (await client.post("/v1/videos", json=body)).status_code == 200
        await tab.open(str(client.base_url))
        await count(tab, ".tile", 12)
        await tab.run("document.querySelector('#older').click()")
        await count(tab, ".tile", 14)
        assert await tab.run("document.querySelector('#older').hidden")
        await tab.until("document.querySelector('.tile').dataset.status === 'completed'")
        await press(tab, "Delete")
        await count(tab, ".tile", 14)  # it asks first
        await press(tab, "Delete it?")
        await count(tab, ".tile", 13)
        assert 13 not in [video["seed"] for video in await jobs(client)]

    visit(config, story)


@needs_chromium
def test_what_goes_wrong_is_told_in_words_at_its_field(config: ServeConfig) -> None:
    async def story(tab: Tab, client: httpx.AsyncClient) -> None:
        problem = "document.querySelector('#make .problem').textContent"
        await ask_for(tab, "")
        assert await tab.until(problem) == "Type a prompt first: what is the video to show?"
        for field, value, message in (
            ("num_frames", "8", "Frames 8 is not 1 + 4k: use 5 or 9."),
            ("size", "50x32", "Width 50 is not a multiple of 16 px"),
            ("num_inference_steps", "201", "Steps is 201; this service allows at most 200"),
        ):
            await ask_for(tab, "a red square", **{field: value})
            await tab.until(f"{problem}.startsWith({message!r})")
            assert await tab.run("[document.activeElement.name, document.activeElement.ariaInvalid]") == [field, "true"]
            await fill(tab, "make", **{field: ""})
        assert await jobs(client) == []
        await ask_for(tab, "a red square", num_frames=33, num_inference_steps=200)
        await count(tab, ".tile[data-status=failed]", 1)
        assert "There is no video\nThe video was not done within" in (
            (await tab.run("document.querySelector('.tile').innerText")).replace("\n\n", "\n")
        )

    visit(replace(config, job_timeout_s=0.3), story)


@needs_chromium
def test_the_page_is_usable_by_keyboard_with_names_for_all_and_on_a_phone(config: ServeConfig) -> None:
    async def story(tab: Tab, client: httpx.AsyncClient) -> None:
        await tab.resize(390, 844, scheme="dark")
        await tab.until("document.querySelector('#about').textContent.includes('parameters')")
        await tab.run("document.querySelector('#make textarea').focus()")
        await tab.type("a red square " + "x" * 200)
        reached = []
        for _ in range(12):
            await tab.press("Tab")
            reached.append(await tab.run("document.activeElement.name || document.activeElement.id"))
            if reached[-1] == "go":
                break
        assert [name for name in reached if name] == ["size", "num_frames", "seed", "n", "input_reference", "go"]
        await fill(tab, "make", n=2)
        await tab.press("Enter")
        await count(tab, DONE, 2)
        assert await tab.until("document.querySelector('#said').textContent.match(/Seed \\d+ is done/)")
        assert await tab.run("document.documentElement.scrollWidth <= 390")
        nameless = (
            "[...document.querySelectorAll('input, textarea, select, button, progress, video')]"
            ".filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
        )
        assert await tab.run(nameless) == []
        assert await tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"

    visit(config, story)
