"""Gathering requests into batches of one kind, in a bounded queue, on one event loop.

Serve's own ``@serve.batch`` reorders requests and leaves batches short where they differ in size, so each kind has its
own queue here: the kind whose first request has waited longest goes next, and within a kind requests keep their order.
The work runs in a thread, so that the event loop stays free for health checks and refusals.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")

_SMOOTHING = 0.3  # weight of the newest batch in the running mean of batch times


class QueueFullError(Exception):
    """The queue holds as many requests as it may; ``retry_after_s`` is a guess at when it will not."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} requests are waiting already")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Item(Generic[RequestT, ResultT]):
    request: RequestT
    future: asyncio.Future[ResultT]
    arrival: float = field(default_factory=time.monotonic)


class Batcher(Generic[RequestT, ResultT]):
    """Runs requests of one kind together.

    Args:
        run: does a batch, in a thread of its own; one batch at a time. Its second argument tells whether everybody who
            asked has gone (cancelled or timed out), so that it can stop early by raising.
        kind: what requests must share to be run together.
        max_size: most requests of a batch.
        wait_s: longest a request waits for others of its kind while nothing runs.
        max_queued: requests that may wait; those running are not counted.
        on_thread_start: called once in the thread before the first batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[RequestT], Callable[[], bool]], Sequence[ResultT]],
        kind: Callable[[RequestT], Hashable],
        *,
        max_size: int,
        wait_s: float,
        max_queued: int,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._kind = run, kind
        self._max_size, self._wait_s, self._max_queued = max_size, wait_s, max_queued
        self._queues: dict[Hashable, deque[_Item[RequestT, ResultT]]] = {}
        self.num_running = 0  # requests in the batch that runs now
        self._batch_seconds = 1.0  # running mean
        self._changed: asyncio.Event = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch", initializer=on_thread_start)

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._queues.values()))

    @property
    def is_alive(self) -> bool:
        """False once the dispatcher has died, which only a bug can cause."""
        return self._dispatcher is None or not self._dispatcher.done()

    async def submit(self, request: RequestT, *, timeout_s: float | None = None) -> ResultT:
        """The result of a request, once its batch is done, or whatever ``run`` raised.

        A request that is given up after ``timeout_s``, or whose caller is cancelled, leaves the queue at once. One that
        runs already is drawn with its batch to the end, unless all of the batch are given up.

        Raises:
            QueueFullError: if too many requests wait.
            TimeoutError: if the time is over.
        """
        if self.num_queued >= self._max_queued:
            batches = -(-self.num_queued // self._max_size) + (self.num_running > 0)
            raise QueueFullError(self._max_queued, batches * self._batch_seconds)
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch())
        item = _Item[RequestT, ResultT](request, asyncio.get_running_loop().create_future())
        kind = self._kind(request)
        self._queues.setdefault(kind, deque()).append(item)
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await item.future
        finally:
            item.future.cancel()  # does nothing to one that is done
            with suppress(KeyError, ValueError):  # no longer there
                self._queues[kind].remove(item)

    def close(self) -> None:
        """Stop; requests that wait or run are cancelled."""
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        for queue in self._queues.values():
            for item in queue:
                item.future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _dispatch(self) -> None:
        while True:
            self._changed.clear()
            batch, delay = self._next_batch()
            if batch:
                await self._run_batch(batch)
                continue
            try:
                async with asyncio.timeout(delay):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _next_batch(self) -> tuple[list[_Item[RequestT, ResultT]], float | None]:
        """A batch that may run now, or none and the seconds until there is one (None: when another request comes)."""
        self._queues = {kind: queue for kind, queue in self._queues.items() if queue}
        if not self._queues:
            return [], None
        now = time.monotonic()
        ready = [q for q in self._queues.values() if len(q) >= self._max_size or now - q[0].arrival >= self._wait_s]
        if not ready:
            return [], max(0.0, min(q[0].arrival for q in self._queues.values()) + self._wait_s - now)
        queue = min(ready, key=lambda q: q[0].arrival)
        return [queue.popleft() for _ in range(min(self._max_size, len(queue)))], None

    async def _run_batch(self, batch: list[_Item[RequestT, ResultT]]) -> None:
        begin = time.monotonic()
        self.num_running = len(batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread,
                self._run,
                [item.request for item in batch],
                lambda: all(item.future.done() for item in batch),
            )
            for item, result in zip(batch, results, strict=True):
                if not item.future.done():
                    item.future.set_result(result)
        except Exception as error:
            waiting = [item for item in batch if not item.future.done()]
            if waiting:
                logger.exception("a batch of %d failed", len(batch))
            for item in waiting:
                item.future.set_exception(error)
        finally:
            self.num_running = 0
            self._batch_seconds += _SMOOTHING * (time.monotonic() - begin - self._batch_seconds)
