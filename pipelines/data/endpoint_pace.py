"""When to ask an endpoint: evenly, not before it wants to be asked, less often while it fails, and for how long."""

import asyncio
import math
import random
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

FIRST_BACKOFF = 0.5  # seconds
LONGEST_BACKOFF = 30.0


class Pacer:
    """Keeps the starts of requests apart. The caller lets one in at a time."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._earliest = 0.0

    async def turn(self) -> None:
        """Return when the next request may start."""
        while (delay := self._earliest - time.monotonic()) > 0:
            await asyncio.sleep(delay)  # and look again: `hold` may have moved it
        self._earliest = time.monotonic() + self._interval

    def hold(self, seconds: float) -> None:
        """Let nothing start for that long."""
        self._earliest = max(self._earliest, time.monotonic() + seconds)


@dataclass
class Silence:
    """Whether an endpoint answers anybody, and for how long it has not."""

    patience: float  # seconds
    since: float | None = None  # when the first request that got no answer started; None: the last one got one
    last_answer: float = field(default_factory=time.monotonic)
    last_failure: str = ""

    def answered(self) -> None:
        """Note an answer of any kind."""
        self.since, self.last_answer = None, time.monotonic()

    def failed(self, failure: str, started: float) -> None:
        """Note a request, started at that time of the monotonic clock, that got none."""
        self.last_failure = failure
        if self.since is None:
            self.since = max(started, self.last_answer)

    @property
    def seconds(self) -> float:
        """How long nothing has been answered."""
        return 0.0 if self.since is None else time.monotonic() - self.since

    @property
    def patience_left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.patience - self.seconds)


def backoff(attempt: int) -> float:
    """Seconds to wait after a failed attempt (counted from 1): exponential, with full jitter."""
    return random.uniform(0, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(attempt - 1, 16)))


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header (seconds or an HTTP date) asks for; 0 where it says nothing sensible."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
