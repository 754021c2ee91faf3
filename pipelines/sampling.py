"""Something measured time and again while other work goes on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sampled(measure: Callable[[], float], seconds: float) -> Iterator[list[float]]:
    """Samples of a measure while the block runs, so many seconds apart; the first is that at its begin."""
    samples = [measure()]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            samples.append(measure())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
