"""The batch plan: which rows each global step sees, as a pure function of snapshot, seed and global batch.

Nothing here has state, so a resume at step k, on any number of workers, sees exactly what an uninterrupted run would
have seen. All rows of a step come from one bucket (one latent shape).

Every bucket is read as an endless stream, one full shuffle of its rows after another, and cut into batches of
``global_batch`` rows. So each row is seen once per epoch, no row is ever left out, and a batch may hold the end of one
epoch and the start of the next. A bucket with fewer rows than a batch gets its batches more rarely, in proportion.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.data.snapshot.read import Manifest
from pipelines.errors import UserError
from pipelines.streams import numpy_stream
from pipelines.training.config import TrainConfig

# Rows shuffled together. Larger sets are shuffled shard by shard, then within windows of whole shards of about this
# many rows, so that a reader needs only a few shards at a time.
WINDOW_ROWS = 1 << 18


@dataclass(frozen=True)
class PlanBucket:
    """Rows of one latent shape, in the order of the manifest."""

    index: int  # in ``Manifest.buckets``
    shape: tuple[int, int, int]  # latent [t, h, w]
    shard_rows: tuple[int, ...]
    first_row: int  # id, unique in the snapshot's split, of the bucket's row 0

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(self.shard_rows)


@dataclass(frozen=True)
class PlannedStep:
    """What one global step sees."""

    index: int
    epoch: int  # completed passes over the snapshot when the step begins
    bucket: PlanBucket
    rows: tuple[int, ...]  # row numbers within the bucket, ``global_batch`` of them

    def row_id(self, row: int) -> int:
        """Id of a row of this step's bucket that is unique in the snapshot's split."""
        return self.bucket.first_row + row


class BatchPlan:
    """Random access to the steps of a run.

    Raises:
        UserError: if there are fewer rows than one batch.
    """

    def __init__(self, buckets: Sequence[PlanBucket], *, seed: int, global_batch: int) -> None:
        self.buckets = tuple(bucket for bucket in buckets if bucket.num_rows)
        self.seed = seed
        self.global_batch = global_batch
        self.num_rows = sum(bucket.num_rows for bucket in self.buckets)
        if self.num_rows < global_batch:
            raise UserError(
                f"the snapshot has {self.num_rows} training rows, fewer than a batch of global_batch = {global_batch}: "
                f"set global_batch to at most {max(self.num_rows, 1)}, or curate more videos"
            )
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._shuffle = lru_cache(maxsize=2 * len(self.buckets))(self._make_shuffle)

    @classmethod
    def from_manifest(cls, manifest: Manifest, config: TrainConfig) -> "BatchPlan":
        """The plan of a run over its split of a snapshot."""
        buckets: list[PlanBucket] = []
        first_row = 0
        for index, bucket in enumerate(manifest.buckets):
            if bucket.split == config.data.split:
                rows = tuple(shard.rows for shard in bucket.shards)
                buckets.append(PlanBucket(index, (bucket.t, bucket.h, bucket.w), rows, first_row))
                first_row += sum(rows)
        return cls(buckets, seed=config.seed, global_batch=config.global_batch)

    def step(self, index: int) -> PlannedStep:
        """Step ``index`` (0, 1, 2, ... without end)."""
        epoch = self._epoch_of(index)
        position = index - self._steps_before(epoch)
        which, batch = self._order(epoch)[position]
        bucket = self.buckets[which]
        start = batch * self.global_batch
        rows: list[int] = []
        while len(rows) < self.global_batch:
            lap, offset = divmod(start + len(rows), bucket.num_rows)
            rows += self._shuffle(which, lap)[offset : offset + self.global_batch - len(rows)].tolist()
        return PlannedStep(index=index, epoch=epoch, bucket=bucket, rows=tuple(rows))

    def _batches_before(self, which: int, epoch: int) -> int:
        return epoch * self.buckets[which].num_rows // self.global_batch

    def _steps_before(self, epoch: int) -> int:
        return sum(self._batches_before(which, epoch) for which in range(len(self.buckets)))

    def _epoch_of(self, index: int) -> int:
        # An epoch holds num_rows / global_batch steps, but for rounding: at most one step per bucket.
        slack = (len(self.buckets) + 1) * self.global_batch // self.num_rows + 2
        guess = index * self.global_batch // self.num_rows
        low = max(0, guess - slack)
        return bisect_right(range(low, guess + slack + 1), index, key=self._steps_before) - 1 + low

    def _make_order(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, batch of its stream) of every step of an epoch; a bucket's batches stay in order."""
        spans = {
            which: range(self._batches_before(which, epoch), self._batches_before(which, epoch + 1))
            for which in range(len(self.buckets))
        }
        turns = [which for which, span in spans.items() for _ in span]
        numpy_stream(self.seed, "order", epoch).shuffle(turns)
        batches = {which: iter(span) for which, span in spans.items()}
        return [(which, next(batches[which])) for which in turns]

    def _make_shuffle(self, which: int, lap: int) -> np.ndarray:
        """A permutation of a bucket's rows."""
        bucket = self.buckets[which]
        stream = numpy_stream(self.seed, "rows", bucket.first_row, lap)
        starts = np.cumsum([0, *bucket.shard_rows])
        windows: list[list[np.ndarray]] = [[]]
        for shard in stream.permutation(len(bucket.shard_rows)):
            if sum(map(len, windows[-1])) >= WINDOW_ROWS:
                windows.append([])
            windows[-1].append(np.arange(starts[shard], starts[shard + 1]))
        return np.concatenate([stream.permutation(np.concatenate(window)) for window in windows])


def rank_rows(rows: Sequence[int], *, rank: int, num_workers: int, micro_batch: int) -> list[tuple[int, ...]]:
    """The part of a step's rows that one worker takes, cut into its micro-batches.

    Raises:
        ValueError: if the rows do not divide evenly (the config's check comes first).
    """
    if len(rows) % (num_workers * micro_batch):
        raise ValueError(f"{len(rows)} rows do not divide by {num_workers} workers x {micro_batch} rows")
    share = len(rows) // num_workers
    start = rank * share
    return [tuple(rows[i : i + micro_batch]) for i in range(start, start + share, micro_batch)]
