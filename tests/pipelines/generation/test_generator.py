"""Asking replicas that do not answer. Replicas that do: serving/test_api.py; replicas that are killed: serving/."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipelines.generation import generator
from pipelines.generation.generator import ask
from pipelines.generation.request import Refusal


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_GRACE_S", 0.05)
    monkeypatch.setattr(generator, "PAUSE_S", 0.001)


def answer_of(replica: Callable[..., Awaitable[bytes | Refusal]], timeout_s: float | None) -> bytes | Refusal:
    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=replica))
    request: Any = None
    return asyncio.run(asyncio.wait_for(ask(handle, request, timeout_s), 10))


async def never(*_: Any) -> bytes:
    await asyncio.Event().wait()
    return b""


def test_a_model_without_a_running_process_answers_in_time() -> None:
    assert answer_of(never, 0.05) == Refusal(reason="timeout", message="no process of the model answered within 0.05 s")


def test_a_request_that_loses_its_replica_is_asked_again_within_what_is_left_of_its_time() -> None:
    times: list[float] = []

    async def second_answers(_: Any, timeout_s: float) -> bytes:
        times.append(timeout_s)
        if len(times) == 1:
            raise ActorDiedError
        return b"video"

    assert answer_of(second_answers, 60.0) == b"video"
    assert 0 < times[1] < times[0] <= 60.0


@pytest.mark.parametrize("late", [never, lambda *_: asyncio.sleep(0, Refusal(reason="timeout", message="too late"))])
def test_a_lost_request_that_runs_out_of_time_is_to_come_again(late: Callable[..., Awaitable[Any]]) -> None:
    asked = 0

    async def dies_first(*arguments: Any) -> bytes | Refusal:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ActorDiedError
        answer: bytes | Refusal = await late(*arguments)
        return answer

    answer = answer_of(dies_first, 0.2)
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.retry_after_s > 0) == ("lost", True)
    assert "ActorDiedError" in answer.message


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_request_that_kills_every_replica_does_not_do_so_for_ever(timeout_s: float | None) -> None:
    asked = 0

    async def dies(*_: Any) -> bytes:
        nonlocal asked
        asked += 1
        raise ActorDiedError

    answer = answer_of(dies, timeout_s)
    assert isinstance(answer, Refusal)
    assert (answer.reason, asked) == ("lost", 5)
