"""The batch plan: which rows each global step sees, as a pure function of snapshots, seed and batch.

Nothing here has state, so a resume at step k, on any number of workers, sees exactly what an uninterrupted run would
have seen. All rows of a step come from one bucket: one latent shape of one dataset.

Every bucket is read as an endless stream, one full shuffle of its rows (a lap) after another, and cut into batches. So
each row is seen once per lap, no row is ever left out, and a batch may hold the end of one lap and the start of the
next. How many steps of an epoch a bucket gets is a fraction, of which no part is lost: in proportion to its rows, or
as ``data.sources`` and ``data.mix`` say. An epoch has as many steps as it takes to see every row once.

**Lanes.** A shuffle of all rows would have a worker decode a row group for every row. In order 2 a lap is laid out as
shards in random order, the row groups of each in random order, and cut into as many lanes as a batch has rows. Each
lane goes through its own piece, shuffled within windows of bounded size, and a batch takes one row of each. A worker,
which takes neighbouring rows of every batch, so reads its own lanes, and each of their row groups once (but those at
the seams of two lanes), whatever the number of workers is. Buckets of less than a MB are shuffled whole.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.data.snapshot.read import Manifest
from pipelines.errors import UserError
from pipelines.streams import numpy_stream
from pipelines.training.config import DataConfig, TrainConfig

# Rows shuffled together where a bucket is shuffled whole, and in order 1: whole shards of about this many rows.
WINDOW_ROWS = 1 << 18
# Decoded bytes of a bucket up to which it is shuffled whole: all a loader ever has to decode of it.
WHOLE_BYTES = 1 << 20
# Decoded bytes of the open windows of all lanes of all buckets together. A loader that serves all of them, the only
# one of its run, keeps this much, and two row groups of each lane.
WINDOW_BYTES = 64 << 20
_OLD_GROUP_ROWS = 256  # of snapshots whose manifest does not say

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class PlanBucket:
    """Rows of one latent shape of one dataset, in the order of the manifest."""

    dataset: int  # number among the run's datasets
    index: int  # in ``Manifest.buckets`` of that dataset
    shape: tuple[int, int, int]  # latent [t, h, w]
    shard_rows: tuple[int, ...]
    first_row: int  # id, unique among the rows of the run, of the bucket's row 0
    batch: int  # rows of a step
    group_rows: int  # of a row group of its shards
    row_bytes: int  # of a decoded row, roughly

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(self.shard_rows)

    @property
    def kind(self) -> str:
        """What ``data.mix`` calls it."""
        return "image" if self.shape[0] == 1 else "video"


@dataclass(frozen=True)
class PlannedStep:
    """What one global step sees."""

    index: int
    epoch: int  # passes over all rows that are complete when the step begins
    bucket: PlanBucket
    rows: tuple[int, ...]  # row numbers within the bucket

    def row_id(self, row: int) -> int:
        """Id of a row of this step's bucket that is unique among the rows of the run."""
        return self.bucket.first_row + row


class BatchPlan:
    """Random access to the steps of a run.

    Args:
        buckets: What there is to see.
        steps: Of each bucket, the steps that it has in an epoch.
        seed: Of every shuffle.
        order: ``data.order``.
        mixed: Whether steps are spread evenly over an epoch, kinds of buckets by turns, and not shuffled.
    """

    def __init__(
        self, buckets: Sequence[PlanBucket], steps: Sequence[Fraction], *, seed: int, order: int, mixed: bool = False
    ) -> None:
        self.buckets = tuple(buckets)
        self.steps = tuple(steps)
        self.seed, self.order, self.mixed = seed, order, mixed
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch)
        self._lap = lru_cache(maxsize=2 * len(self.buckets))(self._make_lap)

    @classmethod
    def from_manifests(cls, manifests: Sequence[Manifest], config: TrainConfig) -> "BatchPlan":
        """The plan of a run over its split of its datasets, which are those of the config in their order.

        Raises:
            UserError: if there is too little to train on; the message names what is missing.
        """
        buckets: list[PlanBucket] = []
        first_row = 0
        for dataset, manifest in enumerate(manifests):
            for index, bucket in enumerate(manifest.buckets):
                rows = tuple(shard.rows for shard in bucket.shards)
                if bucket.split != config.data.split or not sum(rows):
                    continue
                buckets.append(
                    PlanBucket(
                        dataset=dataset,
                        index=index,
                        shape=bucket.shape,
                        shard_rows=rows,
                        first_row=first_row,
                        batch=config.batch_rows(bucket.t),
                        group_rows=bucket.row_group_rows or _OLD_GROUP_ROWS,
                        row_bytes=bucket.row_bytes,
                    )
                )
                first_row += sum(rows)
        splits = sorted({bucket.split for manifest in manifests for bucket in manifest.buckets if bucket.rows})
        if splits and config.data.split not in splits:
            raise UserError(f"data.split: no split {config.data.split!r}; there are {', '.join(splits)}")
        mix = config.data.mix
        used = [bucket for bucket in buckets if mix is None or getattr(mix, bucket.kind) is not None]
        _check_rows(used, config)
        mixed = mix is not None or bool(config.data.sources)
        return cls(used, steps_per_epoch(used, config.data), seed=config.seed, order=config.data.order, mixed=mixed)

    @property
    def epoch_rows(self) -> int:
        """Rows that are seen in an epoch."""
        return int(sum(steps * bucket.batch for steps, bucket in zip(self.steps, self.buckets, strict=True)))

    def step(self, index: int) -> PlannedStep:
        """Step ``index`` (0, 1, 2, ... without end)."""
        epoch = self._epoch_of(index)
        position = index - self._steps_before(epoch)
        which, batch = (int(column[position]) for column in self._epoch_order(epoch))
        bucket = self.buckets[which]
        laps, places = np.divmod(np.arange(batch * bucket.batch, (batch + 1) * bucket.batch), bucket.num_rows)
        rows = [self._lap(which, lap).rows(places[laps == lap]) for lap in np.unique(laps).tolist()]
        return PlannedStep(index=index, epoch=epoch, bucket=bucket, rows=tuple(np.concatenate(rows).tolist()))

    def _batches_before(self, which: int, epoch: int) -> int:
        return int(epoch * self.steps[which])

    def _steps_before(self, epoch: int) -> int:
        return sum(self._batches_before(which, epoch) for which in range(len(self.buckets)))

    def _epoch_of(self, index: int) -> int:
        # An epoch has the sum of the buckets' steps, but for rounding: at most one step per bucket.
        per_epoch = sum(self.steps)
        guess = int(index / per_epoch)
        slack = int((len(self.buckets) + 1) / per_epoch) + 2
        low = max(0, guess - slack)
        return bisect_right(range(low, guess + slack + 1), index, key=self._steps_before) - 1 + low

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int32], Rows]:
        """Of every step of an epoch: its bucket, and which batch of it; a bucket's batches stay in order."""
        first = [self._batches_before(which, epoch) for which in range(len(self.buckets))]
        counts = [self._batches_before(which, epoch + 1) - first[which] for which in range(len(self.buckets))]
        turns = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        stream = numpy_stream(self.seed, "order", epoch)
        if self.mixed:
            turns = self._spread(turns, counts, stream)
        else:
            stream.shuffle(turns)
        batches = np.empty(len(turns), np.int64)
        for which, count in enumerate(counts):
            batches[turns == which] = first[which] + np.arange(count)
        return turns, batches

    def _spread(
        self, turns: NDArray[np.int32], counts: Sequence[int], stream: np.random.Generator
    ) -> NDArray[np.int32]:
        """Turns such that any stretch of them has about its share of every bucket, and its very share of every kind."""
        numbers = np.concatenate([np.arange(count) for count in counts])
        turns = turns[np.argsort((numbers + stream.random(len(turns))) / np.repeat(counts, counts), kind="stable")]
        is_image = np.array([bucket.kind == "image" for bucket in self.buckets])[turns]
        kinds = [turns[is_image], turns[~is_image]]
        due = np.concatenate([(np.arange(len(own)) + 0.5) / max(1, len(own)) for own in kinds])
        return np.concatenate(kinds)[np.argsort(due, kind="stable")]

    def _make_lap(self, which: int, lap: int) -> "_WholeLap | _LaneLap":
        bucket = self.buckets[which]
        stream = numpy_stream(self.seed, "rows", bucket.first_row, lap)
        if self.order == 1 or bucket.num_rows * bucket.row_bytes <= WHOLE_BYTES:
            return _WholeLap(bucket, stream)
        return _LaneLap(bucket, stream, window_bytes=WINDOW_BYTES // len(self.buckets))


class _WholeLap:
    """A permutation of a bucket's rows, shuffled within windows of whole shards."""

    def __init__(self, bucket: PlanBucket, stream: np.random.Generator) -> None:
        starts = np.cumsum([0, *bucket.shard_rows])
        windows: list[list[Rows]] = [[]]
        for shard in stream.permutation(len(bucket.shard_rows)):
            if sum(map(len, windows[-1])) >= WINDOW_ROWS:
                windows.append([])
            windows[-1].append(np.arange(starts[shard], starts[shard + 1]))
        self._rows = np.concatenate([stream.permutation(np.concatenate(window)) for window in windows])

    def rows(self, places: Rows) -> Rows:
        """The rows at some places of the lap."""
        return self._rows[places]


class _LaneLap:
    """A permutation of a bucket's rows in lanes; it keeps row groups and one lane's order, no list of all rows."""

    def __init__(self, bucket: PlanBucket, stream: np.random.Generator, *, window_bytes: int) -> None:
        self._firsts, self._starts = _shuffled_groups(bucket, stream)
        self._lanes = bucket.batch
        # Rows of a lane, and how many lanes have one more, at their end.
        self._length, self._longer = divmod(bucket.num_rows, bucket.batch)
        # A window reaches over a quarter of its lane at most, so that also short lanes read little but their own rows.
        window = min(window_bytes // (self._lanes * bucket.row_bytes), self._length // 4)
        window = max(window, bucket.group_rows, 1)
        places = np.arange(self._length)
        cuts = range(window, self._length, window)
        self._order = np.concatenate([stream.permutation(part) for part in np.split(places, cuts)])

    def rows(self, places: Rows) -> Rows:
        """The rows at some places of the lap."""
        turn, lane = np.divmod(places, self._lanes)
        inner = turn < self._length
        turn[inner] = self._order[turn[inner]]
        # Every other lane runs backwards: neighbours then meet at their seam, and read what lies there at one time.
        turn = np.where(inner & (lane % 2 == 1), self._length - 1 - turn, turn)
        laid = lane * self._length + np.minimum(lane, self._longer) + turn  # where, in the order of row groups
        group = np.searchsorted(self._starts, laid, side="right") - 1
        found: Rows = self._firsts[group] + laid - self._starts[group]
        return found


def _shuffled_groups(bucket: PlanBucket, stream: np.random.Generator) -> tuple[Rows, Rows]:
    """Row groups shard after shard, both shuffled: the first row of each, and how many rows lie before it."""
    rows = np.array(bucket.shard_rows)
    groups = -(-rows // bucket.group_rows)
    shard = np.repeat(np.arange(len(rows)), groups)  # of each row group
    number = np.arange(len(shard)) - np.repeat(np.cumsum(groups) - groups, groups)  # in its shard
    counts = np.minimum(bucket.group_rows, rows[shard] - number * bucket.group_rows)
    firsts = (np.cumsum(rows) - rows)[shard] + number * bucket.group_rows
    rank = stream.permutation(len(rows))
    order = np.lexsort((stream.permutation(len(shard)), rank[shard]))
    return firsts[order], np.cumsum(counts[order]) - counts[order]


def steps_per_epoch(buckets: Sequence[PlanBucket], data: DataConfig) -> list[Fraction]:
    """How many steps of an epoch each bucket has.

    By itself as many as its rows fill, times the ``repeat`` of its dataset. ``mix`` sets the sum of a kind, weights
    the sum of each dataset (within each kind, where there is a ``mix``), among the datasets that have rows there.
    """
    sources = data.sources
    repeats = [Fraction(str((sources[b.dataset].repeat if sources else None) or 1)) for b in buckets]
    natural = [repeat * b.num_rows / b.batch for repeat, b in zip(repeats, buckets, strict=True)]
    weighted = bool(sources) and sources[0].weight is not None
    kinds = {kind: Fraction(str(ratio)) for kind, ratio in vars(data.mix).items() if ratio} if data.mix else {}
    result = list(natural)
    for kind in kinds or (None,):
        scope = [i for i, bucket in enumerate(buckets) if kind in (None, bucket.kind)]
        total = sum(natural) * kinds[kind] / sum(kinds.values()) if kind else sum(natural)
        weights = {buckets[i].dataset: Fraction(str(sources[buckets[i].dataset].weight)) for i in scope if weighted}
        for i in scope:
            own = [j for j in scope if not weighted or buckets[j].dataset == buckets[i].dataset]
            share = weights[buckets[i].dataset] / sum(weights.values()) if weighted else 1
            result[i] = total * share * natural[i] / sum(natural[j] for j in own)
    return result


def _check_rows(buckets: Sequence[PlanBucket], config: TrainConfig) -> None:
    data = config.data
    for number, source in enumerate(data.sources):
        if not any(bucket.dataset == number for bucket in buckets):
            raise UserError(
                f"data.sources: {source.dataset} has no rows of the split {data.split!r} that are to be trained on: "
                "leave it out, or curate more videos"
            )
    kinds = {kind: [bucket for bucket in buckets if bucket.kind == kind] for kind in ("image", "video")}
    for kind, ratio in vars(data.mix).items() if data.mix else ():
        if ratio is not None and not kinds[kind]:
            raise UserError(
                f"data.mix names {kind}, and there is no {kind} in the split {data.split!r}: leave {kind} out of "
                "data.mix, or name a dataset that has some"
            )
    apart = data.mix is not None or config.image_batch is not None
    for own in [own for own in kinds.values() if own] if apart and buckets else [buckets]:
        image = apart and own[0].kind == "image" and config.image_batch is not None
        name, batch = ("image_batch", config.image_batch) if image else ("global_batch", config.global_batch)
        there = sum(bucket.num_rows for bucket in own)
        if there < (batch or 0):
            workers, most = config.num_workers, there // config.num_workers * config.num_workers  # it is a multiple
            lower = f"set {name} to at most {most}, or " if most else f"lower {name} and num_workers = {workers}, or "
            lower = lower if there else ""
            raise UserError(
                f"there are {there} training rows, fewer than a batch of {name} = {batch}: {lower}curate more videos"
            )


def rank_rows(rows: Sequence[int], *, rank: int, num_workers: int, micro_batches: int) -> list[tuple[int, ...]]:
    """The part of a step's rows that one worker takes, cut as evenly as possible into at most so many micro-batches.

    Fewer where a worker has fewer rows than that, which happens if they do not divide evenly.

    Raises:
        ValueError: if there are fewer rows than workers (the config's check comes first).
    """
    if len(rows) < num_workers:
        raise ValueError(f"{len(rows)} rows are too few for {num_workers} workers")
    first, stop = (len(rows) * i // num_workers for i in (rank, rank + 1))
    parts = min(micro_batches, stop - first)
    cuts = [first + (stop - first) * i // parts for i in range(parts + 1)]
    return [tuple(rows[start:end]) for start, end in pairwise(cuts)]
