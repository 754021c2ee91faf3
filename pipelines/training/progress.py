"""What a person sees of a running training on standard error: a bar on a terminal, else lines with the time."""

import sys
import time

from tqdm import tqdm

from pipelines.training.record import StepRecord

_LINE_SECONDS = 30.0  # between two lines of a log; the first and the last step have one in any case


class Progress:
    """Shows the steps of a run within a block."""

    def __init__(self, steps: int, *, done: int, enabled: bool) -> None:
        self.steps = steps
        self.enabled = enabled
        self._lines = enabled and not sys.stderr.isatty()
        self._began: tuple[float, int] | None = None  # when the first step was shown, and which; workers start before
        self._shown = float("-inf")
        self._cut_told = False
        self._bar = tqdm(
            total=steps, initial=done, desc="train", unit="step", disable=not enabled or self._lines, file=sys.stderr,
            smoothing=0.05, dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line of text, beside the bar."""
        _say(text, enabled=self.enabled)

    def show(self, record: StepRecord) -> None:
        """A step is done."""
        if record.cut_captions and not self._cut_told:
            self._cut_told = True
            self.say(
                f"step {record.step}: {record.cut_captions} of {record.clips} captions did not fit beside their frames "
                f"and were cut, the longest prompt has {record.longest_caption} tokens; to have them whole, raise "
                "model.max_seq_len. The record counts them as cut_captions; this is said once"
            )
        figures = f"loss {record.loss:.3f}, {record.tokens_per_s:,.0f} tokens/s"
        if record.val_loss is not None:
            figures += f", validation {record.val_loss:.3f}"
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(1)
        now = time.monotonic()
        due = now - self._shown >= _LINE_SECONDS or record.step == self.steps or record.val_loss is not None
        if self._lines and due:
            self._shown = now
            if self._began is not None and record.step > self._began[1]:
                began, first = self._began
                left = (now - began) / (record.step - first) * (self.steps - record.step)
                figures += f", {_duration(left)} left"
            self.say(f"step {record.step}/{self.steps}: {figures}")
        self._began = self._began or (now, record.step)


class VideoProgress:
    """Shows within a block how many of the videos that a trial needs are drawn."""

    def __init__(self, name: str, videos: int, *, enabled: bool) -> None:
        self.name, self.videos, self.enabled = name, videos, enabled
        self._lines = enabled and not sys.stderr.isatty()
        self._done, self._began = 0, time.monotonic()
        self._shown = self._began
        self._bar = tqdm(
            total=videos, desc=name, unit="video", disable=not enabled or self._lines or not videos, file=sys.stderr,
            dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> "VideoProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line of text, beside the bar."""
        _say(text, enabled=self.enabled)

    def advance(self, videos: int) -> None:
        """So many more are drawn."""
        self._done += videos
        self._bar.update(videos)
        now = time.monotonic()
        if self._lines and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            left = (now - self._began) / self._done * (self.videos - self._done)
            self.say(f"{self.name}: {self._done}/{self.videos} videos, {_duration(left)} left")


def _say(text: str, *, enabled: bool) -> None:
    if enabled:
        tqdm.write(text if sys.stderr.isatty() else f"{_now()} {text}", file=sys.stderr)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if hours < 3 else f"{hours:.1f} h"
