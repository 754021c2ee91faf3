"""Statistics of shares and of means."""

from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import binomtest
from scipy.stats import t as student_t


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson score interval of a share, at 95 %; everything where nothing was tried."""
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of a mean of independent values, at 95 %; None of fewer than two values."""
    if len(values) < 2:
        return None
    reach = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - reach, fmean(values) + reach
