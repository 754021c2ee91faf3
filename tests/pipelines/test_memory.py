"""Peak memory covers children and counts shared pages once."""

import multiprocessing
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from pipelines.memory import sampled_memory, tree_memory

SIZE = 200_000_000


def hold_own(seconds: float) -> None:
    block = np.ones(SIZE, dtype=np.uint8)
    time.sleep(seconds)
    assert block[-1] == 1


def hold_shared(name: str, seconds: float) -> None:
    block = SharedMemory(name)
    assert sum(block.buf[::4096]) >= 0  # touch every page
    time.sleep(seconds)
    block.close()


def test_peak_includes_children_that_have_ended():
    context = multiprocessing.get_context("spawn")
    base = tree_memory()
    with sampled_memory(tree_memory, 0.05) as samples:
        child = context.Process(target=hold_own, args=(1.0,))
        child.start()
        child.join()
    assert child.exitcode == 0
    assert max(samples) >= base + 0.9 * SIZE
    assert samples[0] < base + 0.1 * SIZE


def test_shared_pages_are_counted_once():
    context = multiprocessing.get_context("spawn")
    block = SharedMemory(create=True, size=SIZE)
    try:
        block.buf[:] = bytes(SIZE)
        base = tree_memory()
        children = [context.Process(target=hold_shared, args=(block.name, 3.0)) for _ in range(2)]
        for child in children:
            child.start()
        highest = 0.0
        while any(child.is_alive() for child in children):
            highest = max(highest, tree_memory())
            time.sleep(0.05)
        assert [child.exitcode for child in children] == [0, 0]
        assert highest - base < 1.5 * SIZE  # three mappings of one block; counted apart, two would be added
    finally:
        block.close()
        block.unlink()
