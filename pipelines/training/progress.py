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
        self._began = (time.monotonic(), done)
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
        if self.enabled:
            tqdm.write(f"{_now()} {text}" if self._lines else text, file=sys.stderr)

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
            began, first = self._began
            left = (now - began) / max(1, record.step - first) * (self.steps - record.step)
            self.say(f"step {record.step}/{self.steps}: {figures}, {_duration(left)} left")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if hours < 3 else f"{hours:.1f} h"
