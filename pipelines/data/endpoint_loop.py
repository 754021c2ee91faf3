"""An event loop beside a program that has none of its own, or one that is not ours."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

_CLOSE_SECONDS = 10.0


@contextmanager
def loop_in_thread(close: Callable[[], Awaitable[None]]) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a daemon thread of its own; what it still does at the end is cancelled.

    Args:
        close: Called in the loop when all else there has ended.
    """
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def live() -> None:
        await end.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close()

    def work() -> None:
        try:
            loop.run_until_complete(live())
        finally:
            loop.close()

    thread = threading.Thread(target=work, name="caption-endpoint", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(end.set)
        if threading.current_thread() is not thread:  # the garbage collector closes generators in any thread
            thread.join(_CLOSE_SECONDS)
