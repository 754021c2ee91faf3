"""Statistics of shares and of means."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray
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


def bootstrap_interval(
    groups: int,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *,
    draws: int = 2000,
    centred: bool = False,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval, at 95 %, of a statistic of groups of values; None of fewer than two groups.

    Whole groups are drawn, as the videos of one prompt are alike; the statistic is told how often each was.

    Args:
        groups: how many there are.
        statistic: from counts [draws, groups], each row a draw of so many groups, to its value in each draw.
        draws: of the bootstrap.
        centred: shift the interval so that the draws' mean is the statistic itself. For distances between
            distributions, which grow when a draw holds the same group twice.
        seed: of the draws.
    """
    if groups < 2:
        return None
    counts = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    values = statistic(counts)
    shift = statistic(np.ones((1, groups), np.int64))[0] - values.mean() if centred else 0.0
    low, high = np.quantile(values, (0.025, 0.975)) + shift
    return float(low), float(high)
