"""A job's log as a person wants to see it: progress bars in one place, not in hundreds of lines."""

import re
import shutil
import time
from collections.abc import Callable

# tqdm's, with a total and without. Ray hands out a log with newlines where a bar returned to the line's begin.
_BAR = re.compile(r"(?P<name>[^|]*?):?\s*(?:\d+%\|[^|]*\||(?<=\s)\d+\S*)\s.*\[\d+:\d\d.*\]\s*")


class LogView:
    """Writes a log piece by piece; pieces may end anywhere."""

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        terminal: bool,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """On a terminal a bar stays in its line; elsewhere it has a line every ``interval`` seconds, and its last."""
        self._write, self._terminal, self._interval, self._clock = write, terminal, interval, clock
        self._rest = ""  # of a line that has no end yet
        self._bar: str | None = None  # name of the bar that is shown
        self._held = ""  # its newest line, not written yet
        self._shown = float("-inf")

    def feed(self, text: str) -> None:
        """The next piece of the log."""
        *lines, self._rest = (self._rest + text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
        for line in lines:
            self._line(line)
        if self._terminal and self._rest and _BAR.fullmatch(self._rest):
            self._show_bar(self._rest)  # a bar's newest state waits for the next to end its line

    def close(self) -> None:
        """The log has ended, or is left."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        self._end_bar()

    def _line(self, line: str) -> None:
        match = _BAR.fullmatch(line)
        if match:
            if self._bar is not None and match["name"] != self._bar:
                self._end_bar()
            self._bar = match["name"]
            self._show_bar(line)
        elif line.strip() or self._bar is None:
            self._end_bar()
            self._write(line + "\n")

    def _show_bar(self, line: str) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._bar = self._bar if self._bar is not None else ""
            self._write(f"\r\x1b[K{line.rstrip()[:width]}")
            return
        now = self._clock()
        if now - self._shown < self._interval:
            self._held = line
            return
        self._write(line.rstrip() + "\n")
        self._held, self._shown = "", now

    def _end_bar(self) -> None:
        if self._bar is None:
            return
        if self._terminal:
            self._write("\n")
        elif self._held:
            self._write(self._held.rstrip() + "\n")
        self._bar, self._held, self._shown = None, "", float("-inf")
