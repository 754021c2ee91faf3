"""Distances between two sets of features, as functions of how often each group of one of them counts.

So a bootstrap over prompts takes features, and what is dear about them, only once.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]  # [rows, width]
# Takes features, the group of each row, and features of the reference; gives the distance as a function of counts
# [draws, groups], each row how often each group counts.
Statistic = Callable[[NDArray[np.int64]], NDArray[np.float64]]
Distance = Callable[[Features, NDArray[np.int64], Features], Statistic]

# CMMD's kernel (Jayasumana et al. 2024) over features of unit length, and the factor that makes it readable.
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_ROWS = 2048  # of a block of kernel values


def cmmd(features: Features, groups: NDArray[np.int64], reference: Features) -> Statistic:
    """Squared maximum mean discrepancy under a Gaussian kernel of width 10, the biased estimate, times 1,000."""
    count = int(groups.max()) + 1
    members = np.bincount(groups, minlength=count).astype(np.float64)
    within = np.zeros((count, count))
    for first in range(0, len(features), _ROWS):
        rows = _kernel(features[first : first + _ROWS], features)
        by_column = np.stack([np.bincount(groups, weights=row, minlength=count) for row in rows])
        np.add.at(within, groups[first : first + _ROWS], by_column)
    across = np.zeros(count)
    for first in range(0, len(features), _ROWS):
        rows = _kernel(features[first : first + _ROWS], reference).mean(axis=1)
        np.add.at(across, groups[first : first + _ROWS], rows)
    between = np.mean([_kernel(reference[i : i + 1], reference).mean() for i in range(len(reference))])

    def statistic(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = counts @ members
        own = np.einsum("dg,gh,dh->d", counts, within, counts, optimize=True) / rows**2
        return np.asarray(_CMMD_SCALE * (own + between - 2 * (counts @ across) / rows), np.float64)

    return statistic


def _kernel(one: Features, other: Features) -> NDArray[np.float64]:
    x, y = one.astype(np.float64), other.astype(np.float64)
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.asarray(np.exp(-squares / (2 * _CMMD_SIGMA**2)), np.float64)


def frechet(features: Features, groups: NDArray[np.int64], reference: Features) -> Statistic:
    """Frechet distance of two Gaussians with the mean and covariance of the sets (of two rows or more each)."""
    theirs = reference.astype(np.float64)
    mean, covariance = theirs.mean(axis=0), _covariance(theirs, np.ones(len(theirs), np.int64))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    ours = features.astype(np.float64)

    def of_draw(counts: NDArray[np.int64]) -> float:
        often = counts[groups]
        own = _covariance(ours, often)
        gap = ((often @ ours / often.sum() - mean) ** 2).sum()
        # The eigenvalues of the product of two covariances are those of this symmetric matrix.
        mixed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ own @ root), 0, None)).sum()
        return float(gap + np.trace(own) + np.trace(covariance) - 2 * mixed)

    return lambda draws: np.array([of_draw(counts) for counts in draws])


def _covariance(rows: NDArray[np.float64], often: NDArray[np.int64]) -> NDArray[np.float64]:
    total = int(often.sum())
    centred = (rows - often @ rows / total) * np.sqrt(often)[:, None]
    return np.asarray(centred.T @ centred / max(1, total - 1), np.float64)
