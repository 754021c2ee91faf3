"""What a running service does under load: many clients at once, each answer held against what was asked."""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from pipelines.errors import UserError

_PROMPTS = (
    "a red square moves left over a blue background",
    "a green circle moves up over a white background",
    "a yellow triangle moves right over a black background",
    "a blue star moves down over a gray background",
)
_SEEDS = 8  # per prompt; a video that comes again must be the same
_PAUSE_S = 1.0  # longest a client waits after a 503, as it would not in earnest; and after no answer
_FIRST_S = 10.0  # until a service says that it is there
_POLL_MS = 250.0  # between looks at a job, where the service does not say
_MEMORY_S = 2.0  # between looks


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a service is tried."""

    url: str
    token: str | None = None
    clients: int = 64
    duration_s: float = 60.0
    jobs: bool = False  # jobs that are polled, else direct requests
    pid: int | None = None  # of the service, whose memory is watched
    request: dict[str, Any] = field(default_factory=dict)  # further fields of each


@dataclass
class _Seen:
    config: LoadConfig
    end: float
    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # from asking to the video
    wrong: list[str] = field(default_factory=list)
    videos: dict[tuple[str, int], bytes] = field(default_factory=dict)
    memory_gb: list[float] = field(default_factory=list)

    def check(self, prompt: str, seed: int, answer: httpx.Response) -> None:
        """Note a video that is not the one asked for: by its seed, its name, or another of the same request."""
        if answer.headers.get("x-lumos-seed") != str(seed):
            self.wrong.append(f"seed {seed} was asked for, {answer.headers.get('x-lumos-seed')} came")
        name = f"{prompt.replace(' ', '-')[:20]}"
        if name not in answer.headers.get("content-disposition", ""):
            self.wrong.append(f"{prompt!r} was asked for, {answer.headers.get('content-disposition')} came")
        if self.videos.setdefault((prompt, seed), answer.content) != answer.content:
            self.wrong.append(f"two videos of {prompt!r} with seed {seed} differ")


def run_load(config: LoadConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Try a service; what was seen, with percentiles of seconds and every answer counted.

    Raises:
        UserError: if no service of ours answers there, or it turns the token away; nothing was asked of it then.
    """
    return asyncio.run(_run(config, say))


async def _run(config: LoadConfig, say: Callable[[str], None]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
    limits = httpx.Limits(max_connections=config.clients)
    await _check_service(config.url, headers)
    async with httpx.AsyncClient(base_url=config.url, headers=headers, timeout=900.0, limits=limits) as http:
        begin = time.monotonic()
        seen = _Seen(config, begin + config.duration_s)
        say(f"{config.clients} clients ask {config.url} for {config.duration_s:g} s")
        watch = asyncio.create_task(_watch_memory(config.pid, seen))
        await asyncio.gather(*(_client(http, number, seen) for number in range(config.clients)))
        watch.cancel()
        spent = time.monotonic() - begin
    videos = len(seen.seconds)
    found: dict[str, Any] = {
        "config": {"clients": config.clients, "duration_s": config.duration_s, "jobs": config.jobs} | config.request,
        "answers": dict(sorted(seen.answers.items())),
        "videos": videos,
        "videos_per_s": round(videos / spent, 3),
        "wrong": seen.wrong[:20],
        "lost": seen.answers.get("no answer", 0),
    }
    if seen.memory_gb:
        third = max(1, len(seen.memory_gb) // 3)
        parts = {"first_third": seen.memory_gb[:third], "last_third": seen.memory_gb[-third:]}
        found["memory_gb"] = {name: round(statistics.median(part), 2) for name, part in parts.items()}
    if videos >= 2:
        cuts = statistics.quantiles(seen.seconds, n=100, method="inclusive")
        found["seconds"] = {f"p{share}": round(cuts[share - 1], 3) for share in (50, 90, 95, 99)}
        found["seconds"]["max"] = round(max(seen.seconds), 3)
    return found


async def _check_service(url: str, headers: dict[str, str]) -> None:
    remedy = "start one by `lumos serve`, or name its address by --url"
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=_FIRST_S) as http:
            answer = await http.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"--url {url}: no service answers there ({type(error).__name__}: {error}); {remedy}") from error
    if answer.status_code in (401, 403):
        raise UserError(f"--url {url}: the service turns the token away; set LUMOS_SERVE_TOKEN to one that it takes")
    if answer.status_code == 404:
        raise UserError(f"--url {url}: what answers there is no service of `lumos serve`; {remedy}")


async def _watch_memory(pid: int | None, seen: _Seen) -> None:
    """Note once a second how much memory a process and its children hold of their own."""
    while pid is not None:
        total = 0
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().uss
        seen.memory_gb.append(total / 2**30)
        await asyncio.sleep(_MEMORY_S)


async def _client(http: httpx.AsyncClient, number: int, seen: _Seen) -> None:
    turn = number
    while time.monotonic() < seen.end:
        prompt, seed = _PROMPTS[turn % len(_PROMPTS)], turn // len(_PROMPTS) % _SEEDS
        turn += 1
        body = {"prompt": prompt, "seed": seed, **seen.config.request}
        begin = time.monotonic()
        try:
            answer = await (_by_job(http, body, seen) if seen.config.jobs else http.post("/v1/videos/sync", json=body))
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            seen.answers["no answer"] += 1
            seen.wrong.append(f"no answer: {type(error).__name__}: {error}")
            await asyncio.sleep(_PAUSE_S)  # a service that has gone is not asked a thousand times a second
            continue
        seen.answers[str(answer.status_code)] += 1
        if answer.status_code == 200:
            seen.seconds.append(time.monotonic() - begin)
            seen.check(prompt, seed, answer)
        elif answer.status_code in (429, 503):
            await asyncio.sleep(min(_PAUSE_S, float(answer.headers.get("retry-after", _PAUSE_S))))
        elif answer.status_code != 504:
            seen.wrong.append(f"{answer.status_code}: {answer.text[:200]}")


async def _by_job(http: httpx.AsyncClient, body: dict[str, Any], seen: _Seen) -> httpx.Response:
    """The file of a job, or the answer that ended it."""
    answer = await http.post("/v1/videos", json=body)
    if answer.status_code != 200:
        return answer
    seen.answers["accepted"] += 1
    path = f"/v1/videos/{answer.json()['id']}"
    while True:
        await asyncio.sleep(float(answer.headers.get("openai-poll-after-ms", _POLL_MS)) / 1000)
        answer = await http.get(path)
        if answer.status_code == 503:
            continue  # of the store, or of Serve while a process is replaced
        if answer.status_code != 200:
            return answer
        if answer.json()["status"] == "failed":
            seen.wrong.append(f"a job failed: {answer.json()['error']}")
            return answer
        if answer.json()["status"] == "completed":
            answer = await http.get(f"{path}/content")
            if answer.status_code == 200:
                await http.delete(path)
            return answer
