"""Near-duplicates: clips that show the same pictures at the same pace, found across the whole set at decision time.

A clip's fingerprint is a thumbnail of every half second. Two clips are near-duplicates if the shorter one's thumbnails
match a stretch of the other's: the mean cosine of thumbnails in step, at the best offset, reaches the threshold. So a
shot that two files begin at different moments is found too, and one that runs backwards is not.

Pairs worth comparing share a bucket of a random-hyperplane hash for some frame. The hash is seeded and the result does
not depend on the order of the clips.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THUMBNAIL = 8  # px, both ways
DIMENSIONS = THUMBNAIL * THUMBNAIL * 3
STEP_SECONDS = 0.5  # between a fingerprint's thumbnails
MIN_FRAMES = 3  # that must match
FLAT = 2.0  # standard deviation of a thumbnail below which it shows nothing that could be told again
_TABLES = 8
_NEIGHBOURS = 16  # in a bucket that each frame is compared with, as a bucket may hold very many

Print = NDArray[np.float32]  # [frames, DIMENSIONS], rows of unit length, or zero where flat


@dataclass(frozen=True)
class NearDuplicate:
    """What a clip is a near-duplicate of."""

    of: int  # index of the clip that is kept
    cosine: float


def unpack_fingerprint(data: bytes) -> Print:
    """Unit vectors of a stored fingerprint (uint8 thumbnails, one after another)."""
    pixels = np.frombuffer(data, np.uint8).reshape(-1, DIMENSIONS).astype(np.float32)
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    lively = length > FLAT * np.sqrt(DIMENSIONS)
    return np.where(lively, centred / np.maximum(length, 1e-6), 0).astype(np.float32)


def similarity(first: Print, second: Print) -> float:
    """Mean cosine of frames in step, at the best offset of the shorter clip within the longer; 0 if too short.

    Moments at which both are flat say nothing and do not count.
    """
    short, long = sorted((first, second), key=len)
    cosines = short @ long.T
    telling = np.any(short, axis=1, keepdims=True) | np.any(long, axis=1, keepdims=True).T
    best = 0.0
    for offset in range(len(long) - len(short) + 1):
        count = int(np.diagonal(telling, offset).sum())
        if count >= MIN_FRAMES:
            best = max(best, float(np.diagonal(cosines, offset).sum()) / count)
    return best


def find_near_duplicates(keys: Sequence[str], prints: Sequence[Print], threshold: float) -> dict[int, NearDuplicate]:
    """The clips that need not be kept, and what they are near-duplicates of.

    Args:
        keys: Of the clips.
        prints: Their fingerprints.
        threshold: Cosine from which two clips are near-duplicates.

    Returns:
        By index; of every group of clips linked by similarity, all but the one with the lowest key.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ranked = [prints[index] for index in order]
    parent = list(range(len(order)))

    def root(clip: int) -> int:
        while parent[clip] != clip:
            parent[clip] = parent[parent[clip]]
            clip = parent[clip]
        return clip

    for first, second in sorted(set(_candidates(ranked))):
        low, high = sorted((root(first), root(second)))
        if low != high and similarity(ranked[first], ranked[second]) >= threshold:
            parent[high] = low
    found = {}
    for clip in range(len(order)):
        kept = root(clip)
        if kept != clip:
            found[order[clip]] = NearDuplicate(order[kept], similarity(ranked[clip], ranked[kept]))
    return found


def _candidates(prints: Sequence[Print]) -> Iterator[tuple[int, int]]:
    """Pairs of clips, the lower index first, that have a frame in the same bucket."""
    owners = np.repeat(np.arange(len(prints)), [len(frames) for frames in prints])
    if not len(owners):
        return
    frames = np.concatenate(list(prints))
    lively = frames.any(axis=1)
    frames, owners = frames[lively], owners[lively]
    bits = int(np.clip(np.log2(len(frames) + 1), 8, 24))
    planes = np.random.default_rng(0).standard_normal((DIMENSIONS, _TABLES * bits)).astype(np.float32)
    signs = (frames @ planes > 0).reshape(len(frames), _TABLES, bits)
    codes = signs @ (1 << np.arange(bits, dtype=np.int64))
    for table in range(_TABLES):
        by_code = np.lexsort((owners, codes[:, table]))
        buckets = np.split(by_code, np.flatnonzero(np.diff(codes[by_code, table])) + 1)
        for bucket in buckets:
            members = np.unique(owners[bucket])
            for step in range(1, min(len(members), _NEIGHBOURS + 1)):
                yield from zip(members[:-step].tolist(), members[step:].tolist(), strict=True)


def linked_groups(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """For names linked in pairs, directly or through others: the lowest name of each one's group."""
    neighbours: dict[str, set[str]] = defaultdict(set)
    for first, second in pairs:
        neighbours[first].add(second)
        neighbours[second].add(first)
    lowest: dict[str, str] = {}
    for name in sorted(neighbours):
        waiting = [name]
        while waiting:
            member = waiting.pop()
            if member not in lowest:
                lowest[member] = name
                waiting += neighbours[member]
    return lowest
