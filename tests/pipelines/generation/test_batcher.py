import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from pipelines.generation.batcher import Batcher, QueueFullError

Request = tuple[str, int]  # kind, number


class Recorder:
    """A `run` that notes its batches; it can be held up, and it fails for negative numbers."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[Request]] = []
        self.stopped = 0
        self.begun, self.release = threading.Event(), threading.Event()
        if not held:
            self.release.set()

    def __call__(self, requests: Sequence[Request], abandoned: Callable[[], bool]) -> list[int]:
        self.batches.append(list(requests))
        self.begun.set()
        while not self.release.wait(0.005):
            if abandoned():
                self.stopped += 1
                raise RuntimeError("nobody waits")
        if any(number < 0 for _, number in requests):
            raise ValueError("negative")
        return [10 * number for _, number in requests]


def make(run: Recorder, **options: Any) -> Batcher[Request, int]:
    settings = {"max_size": 3, "wait_s": 0.05, "max_queued": 100, **options}
    return Batcher(run, lambda request: request[0], **settings)


def run_async(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_batches_hold_one_kind_in_order_and_every_result_finds_its_caller() -> None:
    run = Recorder()

    async def main() -> None:
        batcher = make(run)
        requests = [("a" if i % 3 else "b", i) for i in range(20)]
        results = await asyncio.gather(*(batcher.submit(request) for request in requests))
        assert results == [10 * i for _, i in requests]
        batcher.close()

    run_async(main())
    assert all(len({kind for kind, _ in batch}) == 1 and len(batch) <= 3 for batch in run.batches)
    for kind in "ab":
        numbers = [number for batch in run.batches for k, number in batch if k == kind]
        assert numbers == sorted(numbers)
    # 13 of one kind and 7 of the other fill all their batches but the last of each.
    assert sorted(map(len, run.batches)) == [1, 1, 3, 3, 3, 3, 3, 3]


def test_a_lone_request_waits_only_so_long_for_company() -> None:
    run = Recorder()

    async def main() -> float:
        batcher = make(run, wait_s=0.1)
        begin = time.monotonic()
        await batcher.submit(("a", 1))
        batcher.close()
        return time.monotonic() - begin

    assert run_async(main()) >= 0.1


def test_a_full_batch_does_not_wait() -> None:
    run = Recorder()

    async def main() -> None:
        batcher = make(run, wait_s=60.0)
        await asyncio.gather(*(batcher.submit(("a", i)) for i in range(3)))
        batcher.close()

    run_async(main())
    assert run.batches == [[("a", 0), ("a", 1), ("a", 2)]]


def test_the_kind_that_waited_longest_goes_next_though_another_is_fuller() -> None:
    run = Recorder(held=True)

    async def main() -> None:
        batcher = make(run, wait_s=0.0)
        tasks = [asyncio.create_task(batcher.submit(("first", 0)))]
        await until(run.begun.is_set)
        for request in [("old", 1), ("new", 2), ("new", 3), ("new", 4)]:
            tasks.append(asyncio.create_task(batcher.submit(request)))
            await asyncio.sleep(0.002)
        run.release.set()
        await asyncio.gather(*tasks)
        batcher.close()

    run_async(main())
    assert [batch[0][0] for batch in run.batches] == ["first", "old", "new"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    run = Recorder(held=True)

    async def main() -> None:
        batcher = make(run, max_size=1, max_queued=2, wait_s=0.0)
        tasks = [asyncio.create_task(batcher.submit(("a", 0)))]
        await until(run.begun.is_set)
        tasks += [asyncio.create_task(batcher.submit(("a", i))) for i in (1, 2)]
        await until(lambda: batcher.num_queued == 2)
        assert batcher.num_running == 1
        with pytest.raises(QueueFullError, match="2 requests are waiting") as refusal:
            await batcher.submit(("a", 3))
        assert refusal.value.retry_after_s > 0
        run.release.set()
        assert await asyncio.gather(*tasks) == [0, 10, 20]
        assert await batcher.submit(("a", 4)) == 40
        batcher.close()

    run_async(main())


def test_a_request_that_times_out_leaves_the_queue() -> None:
    run = Recorder(held=True)

    async def main() -> None:
        batcher = make(run, max_size=1, wait_s=0.0)
        first = asyncio.create_task(batcher.submit(("a", 0)))
        await until(run.begun.is_set)
        with pytest.raises(TimeoutError):
            await batcher.submit(("a", 1), timeout_s=0.05)
        assert batcher.num_queued == 0
        run.release.set()
        await first
        batcher.close()

    run_async(main())
    assert run.batches == [[("a", 0)]]


def test_a_batch_that_everybody_left_is_told_so_and_the_next_one_runs() -> None:
    run = Recorder(held=True)

    async def main() -> None:
        batcher = make(run, max_size=2, wait_s=0.0)
        left = [asyncio.create_task(batcher.submit(("a", i))) for i in (0, 1)]
        await until(run.begun.is_set)
        for task in left:
            task.cancel()
        await until(lambda: run.stopped == 1)
        run.release.set()
        assert await batcher.submit(("a", 2)) == 20
        assert batcher.is_alive
        batcher.close()

    run_async(main())


def test_a_batch_that_one_caller_left_goes_on_for_the_other() -> None:
    run = Recorder(held=True)

    async def main() -> None:
        batcher = make(run, max_size=2, wait_s=60.0)
        left, stays = (asyncio.create_task(batcher.submit(("a", i))) for i in (0, 1))
        await until(run.begun.is_set)
        left.cancel()
        await asyncio.sleep(0.05)
        run.release.set()
        assert await stays == 10
        batcher.close()

    run_async(main())
    assert run.stopped == 0


def test_a_failure_reaches_its_own_batch_only() -> None:
    run = Recorder()

    async def main() -> None:
        batcher = make(run, max_size=2, wait_s=0.02)
        answers = await asyncio.gather(
            *(batcher.submit(r) for r in [("a", -1), ("a", 1), ("b", 2)]), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [ValueError, ValueError, int]
        assert await batcher.submit(("a", 3)) == 30
        batcher.close()

    run_async(main())


def test_the_event_loop_stays_free_while_a_batch_runs() -> None:
    run = Recorder(held=True)

    threading.Timer(10.0, run.release.set).start()  # or a loop that is not free would wait for ever

    async def main() -> None:
        batcher = make(run, wait_s=0.0)
        task = asyncio.create_task(batcher.submit(("a", 1)))
        await until(run.begun.is_set)
        await asyncio.sleep(0.01)
        assert not run.release.is_set()
        assert not task.done()
        run.release.set()
        await task
        batcher.close()

    run_async(main())
