"""A bulk run's requests to replicas, without Ray."""

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.generation.bulk import replicas


def test_a_run_that_is_interrupted_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asyncio wrote a traceback after the message that the run is interrupted."""
    complaints: list[dict[str, Any]] = []
    handle: Any = None
    job: Any = SimpleNamespace(request=None)

    async def never(*_: Any) -> None:
        await asyncio.sleep(3600)

    async def interrupted() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        run = asyncio.ensure_future(replicas._drive(handle, [job, job], never, 2))
        await asyncio.sleep(0.01)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as ``asyncio.run`` does
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        del run
        await asyncio.sleep(0.01)
        gc.collect()

    monkeypatch.setattr(replicas, "ask", never)
    asyncio.run(interrupted())
    assert complaints == []
