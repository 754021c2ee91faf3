"""Near-duplicates: clips that show the same pictures at the same pace, found across the whole set at decision time.

A clip's fingerprint is a thumbnail of every half second. By these pairs are found that may be copies; whether they are
is told by what moves in them too (likeness.py).

Likeness makes chains: two clips may each be like a third, and not like each other. So of a group that is linked, the
best copy is kept, and every further one that is like none of those kept before it.

Pairs worth comparing have some frame of like signature, the signs of 256 random projections of a blurred picture, so
that a cropped one has nearly the same, which is turned so that its lighter half is on the left, so that a mirrored one
has too: frames are sorted by signature eight times, each time by other bits first, and compared with those they come
to lie beside. Ray's workers make the signatures and keep them; each sorts those that begin with some bits and keeps the
pairs. Thumbnails and what moves are read again for the few clips that have a like, compared by workers too, and pairs
that pass come back.
The projections are seeded and the result does not depend on the order of the clips, on how they are dealt to workers,
or on the workers' CPUs: all that is added up is whole, so that sums are exact in any order.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipelines.data.reasons import near_duplicate
from pipelines.data.stage.columns import take
from pipelines.data.stage.tasks import fetch, is_worth_tasks, run_tasks, start_tasks
from pipelines.data.stage.values import StoredValues, ValueGroup
from pipelines.data.steps.likeness import FLAT, Appearance, Limits, likeness
from pipelines.data.steps.run import Run, Step
from pipelines.data.video.fingerprint import DIMENSIONS, THUMBNAIL

_WORDS = 8  # of 32 bits, in a signature
_BITS = 32 * _WORDS
_NEIGHBOURS = 16  # that each frame is compared with, as very many may be alike
_SPREAD = 6.0  # standard deviations by which signatures of frames as like as the threshold asks may differ further
_BLOCK = 1 << 11  # clips whose frames are projected at a time
_TASK_FRAMES = 1 << 20  # that a task sorts, about
_CLIP_BYTES = 8 * DIMENSIONS  # of the fingerprint of a clip, roughly
_CACHED = 1 << 14  # fingerprints that are kept unpacked
_RANGE = 1 << 20  # clips, the pairs of which a task compares
_PAIRS = 1 << 14  # of clips that are compared before groups are formed anew
_GROUPED = 1 << 14  # clips of groups of which a task chooses those to be kept
_KEPT_COMPARED = 64  # copies kept of a group, the best, that each clip of it is compared with

# Of clips at some places, an ascending number for each, the lowest that of the best copy.
Preference = Callable[[NDArray[np.int64]], NDArray[np.int64]]
# Given places of clips, a stored value of each in groups, which number the places given.
Stored = Callable[[NDArray[np.int64]], Iterable[ValueGroup]]


@dataclass(frozen=True)
class StoredClips:
    """Where fingerprints of clips are, and what moves in them; the groups of one are those of the other."""

    fingerprints: Stored
    movements: Stored


@dataclass(frozen=True)
class NearDuplicate:
    """What a clip is a near-duplicate of."""

    of: int  # index of the clip that is kept
    cosine: float


def find_near_duplicates(
    keys: pa.Array | pa.ChunkedArray,
    stored: StoredClips,
    limits: Limits,
    prefer: Preference | None = None,
) -> dict[int, NearDuplicate]:
    """By index, the clips that need not be kept, and what they are near-duplicates of.

    Args:
        keys: Of the clips.
        stored: Where what is compared of places in ``keys`` is.
        limits: From where on two are near-duplicates.
        prefer: Which copies are better; of equals, and without it, that with the lowest key is.
    """
    return _find_linked(keys, stored, limits, prefer)[0]


def _find_linked(
    keys: pa.Array | pa.ChunkedArray, stored: StoredClips, limits: Limits, prefer: Preference | None
) -> tuple[dict[int, NearDuplicate], NDArray[np.int64]]:
    """Likewise, and pairs of near-duplicates, [n, 2], which link all that are so, directly or through others."""
    order = pc.sort_indices(keys).to_numpy().astype(np.int64)
    # From here on clips are numbered in the order of their keys.
    rank, every = np.argsort(order), stored.fingerprints(np.arange(len(order)))
    remote = is_worth_tasks(len(order) * _CLIP_BYTES)
    signed = list(start_tasks(sign, ((group.read, rank[group.rows]) for group in every), remote=remote, num_returns=3))
    seen, candidates = _candidates(signed, len(order), limits.least, remote=remote)
    ranks = np.flatnonzero(seen)
    both = zip(stored.fingerprints(order[ranks]), stored.movements(order[ranks]), strict=True)
    reads = ((group.read, moving.read, ranks[group.rows]) for group, moving in both)
    prints = [read[0] for read in start_tasks(read_prints, reads, remote=remote, num_returns=1)]
    calls = ((limits, prints, *pieces) for pieces in candidates)
    links = np.concatenate([np.zeros((0, 2), np.int64), *run_tasks(link_pairs, calls, remote=remote)])
    linked, local = np.unique(links, return_inverse=True)
    lowest = _lowest_linked(local.reshape(-1, 2), len(linked))
    preference = np.zeros(len(linked), np.int64) if prefer is None else prefer(order[linked])
    found = {}
    groups = ((limits, prints, *some) for some in _deal_groups(linked, lowest, links, preference))
    for clips, kept, cosines in run_tasks(choose_kept, groups, remote=remote):
        for clip, copy, cosine in zip(order[clips].tolist(), order[kept].tolist(), cosines.tolist(), strict=True):
            found[clip] = NearDuplicate(copy, cosine)
    return found, order[links]


def _deal_groups(
    linked: NDArray[np.int64], lowest: NDArray[np.int64], links: NDArray[np.int64], preference: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Whole groups of linked clips, some at a time: the clips, the group of each, the links among them, preferences."""
    names, sizes = np.unique(lowest, return_counts=True)
    call_of = (np.cumsum(sizes) - sizes) // _GROUPED  # of each group
    call_of_clip = call_of[np.searchsorted(names, lowest)]
    call_of_link = call_of_clip[np.searchsorted(linked, links[:, 0])]
    by_clip, by_link = (np.argsort(calls, kind="stable") for calls in (call_of_clip, call_of_link))
    for call in np.unique(call_of).tolist():
        own, own_links = (
            order[slice(*np.searchsorted(calls[order], [call, call + 1]))]
            for calls, order in ((call_of_clip, by_clip), (call_of_link, by_link))
        )
        yield linked[own], lowest[own], links[own_links], preference[own]


class _Prints:
    """What is compared of some clips, fetched from where ``read_prints`` left that of all that have a like."""

    def __init__(self, clips: NDArray[np.int64], prints: Sequence[Any], limits: Limits) -> None:
        self._packed: dict[int, tuple[bytes, bytes | None]] = {}
        for piece in prints:
            numbers, fingerprints, movements = fetch(piece)
            own = np.flatnonzero(np.isin(numbers, clips))
            values = (take(stored, own).to_pylist() for stored in (fingerprints, movements))
            self._packed |= zip(numbers[own].tolist(), zip(*values, strict=True), strict=True)
        self._of = lru_cache(_CACHED)(lambda clip: Appearance(*self._packed[clip]))
        self._limits = limits

    def compare(self, one: int, other: int) -> float | None:
        """The ``likeness`` of two clips."""
        return likeness(self._of(one), self._of(other), self._limits)


def read_prints(
    read: Callable[[], pa.ChunkedArray], read_movements: Callable[[], pa.ChunkedArray], clips: NDArray[np.int64]
) -> tuple[NDArray[np.int64], pa.ChunkedArray, pa.ChunkedArray]:
    """Numbers of some clips, the stored fingerprint of each, and what moves in it."""
    return clips, read(), read_movements()


def link_pairs(limits: Limits, prints: Sequence[Any], *pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of pairs of clips, [n, 2], given in pieces, as many near-duplicates as link all that are so linked by any."""
    pairs = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *pieces]), axis=0)
    clips, local = np.unique(pairs, return_inverse=True)
    local, links, lowest = local.reshape(-1, 2), np.zeros((0, 2), np.int64), np.arange(len(clips))
    known = _Prints(clips, prints, limits)
    for start in range(0, len(pairs), _PAIRS):
        some = local[start : start + _PAIRS]
        some = some[lowest[some[:, 0]] != lowest[some[:, 1]]]  # others are known to be of one group
        alike = [known.compare(first, second) is not None for first, second in clips[some].tolist()]
        links = np.concatenate([links, some[np.array(alike, bool)]])
        lowest = _lowest_linked(links, len(clips))
    return np.asarray(clips[links])


def choose_kept(
    limits: Limits,
    prints: Sequence[Any],
    clips: NDArray[np.int64],
    groups: NDArray[np.int64],
    links: NDArray[np.int64],
    preference: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Of whole groups of clips (ascending), those not kept, the copy kept in place of each, and their cosine."""
    known = _Prints(clips, prints, limits)

    def compare(one: int, other: int) -> float | None:
        return known.compare(int(clips[one]), int(clips[other]))

    found = _choose_kept(groups, np.searchsorted(clips, links), preference, compare)
    kept, cosines = zip(*found.values(), strict=True) if found else ((), ())
    return clips[np.array([*found], np.int64)], clips[np.array(kept, np.int64)], np.array(cosines, np.float64)


def _choose_kept(
    groups: NDArray[np.int64],
    links: NDArray[np.int64],
    preference: NDArray[np.int64],
    compare: Callable[[int, int], float | None],
) -> dict[int, tuple[int, float]]:
    """Of clips that are linked in groups, those not kept: the copy kept in place of each, and the cosine of the two.

    Args:
        groups: Number of each clip's group.
        links: Pairs of clips that are known to be alike.
        preference: The lower the number, the better the copy; of equals the first is.
        compare: The cosine of two clips, if they are alike.
    """
    alike: dict[int, set[int]] = defaultdict(set)
    for one, other in links.tolist():
        alike[one].add(other)
        alike[other].add(one)
    order = np.lexsort((preference, groups))
    _, sizes = np.unique(groups, return_counts=True)
    found: dict[int, tuple[int, float]] = {}
    for members in np.split(order, np.cumsum(sizes)[:-1]):
        kept: list[int] = []
        for clip in members.tolist():
            best = kept[:_KEPT_COMPARED]
            tried = [*best, *sorted(alike[clip].intersection(kept).difference(best))] if kept else []
            cosines = ((copy, compare(clip, copy)) for copy in tried)
            like = next(((copy, cosine) for copy, cosine in cosines if cosine is not None), None)
            if like is None:
                kept.append(clip)
            else:
                found[clip] = like
    return found


def sign(
    read: Callable[[], pa.ChunkedArray], ranks: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], int]:
    """Of every frame of some clips that shows something: signature [words, frames], rank of the clip; how many."""
    # Whole numbers below 2^24, so that sums are exact in any order: how clips are grouped must not change a sign.
    planes = _planes()
    words, owners = [np.zeros((_WORDS, 0), np.uint32)], [np.zeros(0, np.int64)]
    first = 0
    for batch in (chunk.slice(at, _BLOCK) for chunk in read().chunks for at in range(0, len(chunk), _BLOCK)):
        own = ranks[first : first + len(batch)]
        first += len(batch)
        pixels = np.frombuffer(b"".join(batch.to_pylist()), np.uint8).reshape(-1, DIMENSIONS).astype(np.float32)
        sums = pixels.sum(axis=1, keepdims=True)
        spread = DIMENSIONS * np.einsum("ij,ij->i", pixels, pixels).astype(np.float64) - sums[:, 0].astype(float) ** 2
        lively = spread > (FLAT * DIMENSIONS) ** 2
        turned = pixels[lively].reshape(-1, THUMBNAIL, THUMBNAIL, 3)
        columns = turned.sum(axis=(1, 3))
        dark_left = columns[:, : THUMBNAIL // 2].sum(axis=1) < columns[:, THUMBNAIL // 2 :].sum(axis=1)
        turned[dark_left] = turned[dark_left, :, ::-1]
        signs = turned.reshape(-1, DIMENSIONS) @ planes > 0
        words.append(np.packbits(signs, axis=1, bitorder="little").view(np.uint32).T)
        lengths = pc.binary_length(batch).to_numpy() // DIMENSIONS
        owners.append(np.repeat(own, lengths)[lively])
    every = np.concatenate(owners)
    return np.ascontiguousarray(np.concatenate(words, axis=1)), every, len(every)


@lru_cache(1)
def _planes() -> NDArray[np.float32]:
    """Directions, [DIMENSIONS, _BITS], of as many ups as downs, so that brightness does not count; then blurred."""
    halves = np.repeat(np.array([[-1], [1]]), DIMENSIONS // 2, axis=0)
    planes = np.random.default_rng(0).permuted(np.tile(halves, _BITS), axis=0)
    blur = 2 * np.eye(THUMBNAIL) + np.eye(THUMBNAIL, k=1) + np.eye(THUMBNAIL, k=-1)
    blur[[0, -1], [0, -1]] = 3  # the border, repeated: the sum of a picture stays what it is
    small = planes.reshape(THUMBNAIL, THUMBNAIL, 3, _BITS)
    return np.asarray(np.einsum("ya,xb,abcn->yxcn", blur, blur, small).reshape(DIMENSIONS, _BITS), np.float32)


def _candidates(
    signed: Sequence[Sequence[Any]], clips: int, threshold: float, *, remote: bool
) -> tuple[NDArray[np.bool_], list[list[Any]]]:
    """Pairs of clips that have frames of like signatures.

    Returns:
        Of each clip, whether it is in a pair; and of each range of clips, what the pairs are in whose lower one is of
        that range, a few pairs in several of these.
    """
    count = sum(fetch(size) for _, _, size in signed)
    prefix = int(np.clip(np.log2(count + 1), 8, 24))  # bits that must agree
    bits = int(np.clip(np.ceil(np.log2((count + 1) / _TASK_FRAMES)), 0, 8))  # that say which task has a frame
    signatures = [part for words, owners, _ in signed for part in (words, owners)]
    bounds = np.arange(0, max(1, clips) + _RANGE, _RANGE)
    sort = (prefix, threshold, bounds)
    calls = ((word, part, bits, *sort, *signatures) for word in range(_WORDS) for part in range(1 << bits))
    seen, found = np.zeros(clips, bool), []
    for mine, *pieces in start_tasks(find_pairs, calls, remote=remote, num_returns=len(bounds)):
        seen[fetch(mine)] = True
        found.append(pieces)
    return seen, [list(pieces) for pieces in zip(*found, strict=True)]


def find_pairs(
    word: int,
    part: int,
    bits: int,
    prefix: int,
    threshold: float,
    bounds: NDArray[np.int64],
    *signatures: NDArray[Any],
) -> list[NDArray[np.int64]]:
    """Pairs of clips, [n, 2], the lower number first, of which frames lie beside each other and are alike.

    First come the clips that are in any, then the pairs by the range of the lower one, whose ``bounds`` are given.

    Frames are sorted by their signature from the word of that number on; those whose first ``bits`` are ``part`` count.
    ``signatures`` are words and owners of all frames, in turns. Only frames are compared whose first ``prefix`` bits,
    no fewer than ``bits``, agree.
    """
    mine = [np.flatnonzero(words[word] >> (32 - bits) == part) if bits else slice(None) for words in signatures[::2]]
    empty = np.zeros((_WORDS, 0), np.uint32), np.zeros(0, np.int64)
    words = np.concatenate([empty[0], *(each[:, own] for each, own in zip(signatures[::2], mine, strict=True))], axis=1)
    owners = np.concatenate([empty[1], *(each[own] for each, own in zip(signatures[1::2], mine, strict=True))])
    flips = math.acos(min(max(threshold, -1.0), 1.0)) / math.pi  # share of signs that frames so like differ in
    most = _BITS * flips + _SPREAD * math.sqrt(_BITS * flips * (1 - flips)) + 1
    code = words[word].astype(np.uint64) << np.uint64(32) | words[(word + 1) % _WORDS]
    ordered = np.lexsort((owners, code))
    code = code[ordered]
    new = np.ones(len(ordered), bool)  # of a clip's equal frames in a row, one
    new[1:] = (np.diff(owners[ordered]) != 0) | (np.diff(code) != 0)
    ordered, code = ordered[new], code[new] >> np.uint64(64 - prefix)
    found = [np.zeros((0, 2), np.int64)]
    for step in range(1, min(len(ordered), _NEIGHBOURS + 1)):
        near = np.flatnonzero(code[:-step] == code[step:])
        one, other = ordered[near], ordered[near + step]
        differing = np.bitwise_count(words[:, one] ^ words[:, other]).sum(axis=0)
        chosen = (differing <= most) & (owners[one] != owners[other])
        if chosen.any():
            found.append(np.sort(np.stack([owners[one[chosen]], owners[other[chosen]]], axis=1), axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return [np.unique(pairs), *np.split(pairs, np.searchsorted(pairs[:, 0], bounds[1:-1]))]


def linked_groups(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """For names linked in pairs, directly or through others: the lowest name of each one's group."""
    names, links = np.unique(np.array(pairs, str).reshape(-1, 2), return_inverse=True)
    lowest = _lowest_linked(links, len(names))
    return dict(zip(names.tolist(), names[lowest].tolist(), strict=True))


def _lowest_linked(links: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each number below ``count``, the lowest one that pairs of them, [n, 2], link it to, directly or not."""
    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(count, count))
    _, groups = connected_components(graph, directed=False)
    _, first = np.unique(groups, return_index=True)
    return np.asarray(first[groups])


def _stored(clips: pa.Table, column: str, places: NDArray[np.int64]) -> Iterator[ValueGroup]:
    some = take(clips.select(["key", "split_part"]), places)
    stored = StoredValues(files=some["split_part"], keys=some["key"], key_column="key", column=column)
    return stored.groups(np.full(len(places), _CLIP_BYTES))


class NearDuplicates(Step):
    """Marks clips that show what another one shows, found across the whole set.

    Kept is a clip with a caption before one without, then the larger picture, then the longer clip, then the lowest
    key.
    """

    def __init__(self, captioned: Callable[[Run, Sequence[str]], set[str]]) -> None:
        """``captioned`` tells which of some files, by URI, have a caption."""
        self.captioned = captioned

    def apply(self, run: Run) -> None:
        """Decide, and group the sources that are linked so, whose split is drawn together."""
        threshold, moving, clips = run.config.near_duplicates, run.config.moving_duplicates, run.clips
        if threshold is None:
            return
        limits = Limits(still=threshold, moving=moving.pictures, motion=moving.motion)
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        stored = StoredClips(partial(_stored, rows, "fingerprint"), partial(_stored, rows, "movement"))
        found, links = _find_linked(rows["key"], stored, limits, partial(self._prefer, run, rows))
        for place, duplicate in found.items():
            original = rows["key"][duplicate.of].as_py()
            clips.verdicts.set(int(kept[place]), "duplicate", near_duplicate(original, duplicate.cosine))
        sources = take(rows["work_key"], links.ravel()).to_pylist()
        run.groups = linked_groups(list(zip(sources[::2], sources[1::2], strict=True)))

    def _prefer(self, run: Run, rows: pa.Table, places: NDArray[np.int64]) -> NDArray[np.int64]:
        some = take(rows, places)
        captioned = self.captioned(run, pc.unique(some["uri"]).to_pylist())
        areas = [width * height for _, _, width, height in some["picture"].to_pylist()]
        seconds = pc.round(pc.subtract(some["end_s"], some["start_s"]), 3).to_numpy()
        lacking = np.array([uri not in captioned for uri in some["uri"].to_pylist()])
        order = np.lexsort((-seconds, -np.array(areas, np.int64), lacking))
        return np.argsort(order)
