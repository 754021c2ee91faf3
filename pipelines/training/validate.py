"""Loss on held-out rows: the same rows, masks and captions in every run, so that runs compare.

Rows and masks come from streams of the validation's own seed, the mask of a row named by its clip: they depend neither
on the run's seed and mask nor on the number of workers. Captions are the first of each row, none dropped. Nothing that
the training draws or keeps is touched, so its curve is bitwise the same without.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lumos.batch import PackedBatch, pack
from lumos.config import MaskConfig
from lumos.layout import SequenceLayout, frame_tokens
from lumos.masking import sample_masked_positions
from pipelines.data.snapshot.read import Bucket
from pipelines.streams import numpy_stream, torch_stream
from pipelines.training.engine import Engine
from pipelines.training.ingest import StepLoader
from pipelines.training.prepare import PreparedRun

_MASK = MaskConfig()  # the paper's, whatever the run trains with


@dataclass(frozen=True)
class HeldOutRow:
    """A row of the validation."""

    dataset: int  # of the run
    bucket: int  # in ``Manifest.buckets`` of that dataset
    row: int  # in the bucket


def choose_rows(run: PreparedRun) -> list[HeldOutRow]:
    """The rows of the split that a validation takes, those of one bucket together, without what the run cannot read."""
    wanted = run.config.validation
    rows = [
        HeldOutRow(dataset, index, row)
        for dataset, index, bucket in _held_out(run)
        if _fits(run, bucket)
        for row in range(bucket.rows)
    ]
    order = numpy_stream(wanted.seed, "validation").permutation(len(rows))[: wanted.rows]
    return [rows[index] for index in sorted(order)]


def _held_out(run: PreparedRun) -> Iterator[tuple[int, int, Bucket]]:
    """Dataset, number and bucket of all held-out rows."""
    for dataset, snapshot in enumerate(run.datasets):
        for index, bucket in enumerate(snapshot.manifest.buckets):
            if bucket.split == run.config.validation.split:
                yield dataset, index, bucket


def _fits(run: PreparedRun, bucket: Bucket) -> bool:
    """Whether the run's vocabulary can write rows of a bucket, and its model read them."""
    try:
        frame_tokens(run.vocabulary, np.zeros((bucket.h, bucket.w), dtype=np.int64))
    except ValueError:
        return False
    return run.row_tokens(bucket.shape) <= run.model.max_seq_len


class Validator:
    """One worker's share of every validation. All workers make and call it together."""

    def __init__(self, run: PreparedRun, *, rank: int, device: torch.device) -> None:
        self.run, self.rank, self.device = run, rank, device
        self.rows = choose_rows(run) if run.config.validation.every else []
        self._num_frames = max((self._bucket(row).t for row in self.rows), default=0)
        self._batches: list[tuple[PackedBatch, float]] | None = None  # with their weight, made when first needed

    def due(self, step: int) -> bool:
        """Whether a validation follows a 1-based step."""
        every = self.run.config.validation.every
        return bool(self.rows) and (step % every == 0 or step == self.run.config.steps)

    def __call__(self, engine: Engine) -> dict[str, Any]:
        """The fields that a validation has in the record of a step."""
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._make_batches()
        totals = torch.zeros(2, self._num_frames, dtype=torch.float64, device=self.device)
        engine.eval()
        with torch.no_grad():
            for batch, weight in self._batches:
                _, sums, counts = engine(batch.to(self.device), self._num_frames)
                totals += weight * torch.stack([sums, counts])
        engine.train()
        dist.all_reduce(totals)
        sums, counts = totals.tolist()
        return {
            "val_loss": sum(sums) / sum(counts),
            "val_frame_losses": tuple(total / count for total, count in zip(sums, counts, strict=True)),
            "val_tokens": int(sum(counts)),
            "val_seconds": time.perf_counter() - began,
        }

    def _make_batches(self) -> list[tuple[PackedBatch, float]]:
        """This worker's micro-batches. All have as many, for the forward pass is one of all workers under ZeRO-3."""
        loader = StepLoader(self.run, self.rank, dist.get_world_size())
        groups: list[list[HeldOutRow]] = []
        for row in self.rows:
            first = groups[-1][0] if groups else None
            fits = first is not None and (first.dataset, first.bucket) == (row.dataset, row.bucket)
            if fits and len(groups[-1]) < self.run.rows_per_pass(self._bucket(row).shape):
                groups[-1].append(row)
            else:
                groups.append([row])
        workers = dist.get_world_size()
        batches = [self._pack(loader, group) for group in groups[self.rank :: workers]]
        weights = [1.0] * len(batches)
        for _ in range(-(-len(groups) // workers) - len(batches)):
            batches.append(batches[-1] if batches else self._pack(loader, groups[0]))
            weights.append(0.0)
        return list(zip(batches, weights, strict=True))

    def _pack(self, loader: StepLoader, group: list[HeldOutRow]) -> PackedBatch:
        documents = [self._document(loader, row) for row in group]
        documents.sort(key=lambda document: len(document[0]))
        ids, masked, layouts = zip(*documents, strict=True)
        return pack(torch.cat(ids), torch.cat(masked), layouts, self.run.vocabulary)

    def _bucket(self, row: HeldOutRow) -> Bucket:
        return self.run.datasets[row.dataset].manifest.buckets[row.bucket]

    def _document(self, loader: StepLoader, row: HeldOutRow) -> tuple[Tensor, Tensor, SequenceLayout]:
        record = loader.rows[row.dataset].row(row.bucket, row.row)
        caption = record["captions"][0]["text"] if record["captions"] else None
        ids, layout, _ = loader.sequence(row.dataset, record, self._bucket(row).shape, caption)
        stream = torch_stream(self.run.config.validation.seed, "validation mask", record["clip_id"])
        masked = sample_masked_positions(layout, _MASK, stream)
        return ids.to(torch.int64), masked, layout


def describe(run: PreparedRun) -> str | None:
    """What is missing of a validation that is asked for; None if nothing is."""
    wanted = run.config.validation
    buckets = [bucket for _, _, bucket in _held_out(run) if bucket.rows]
    unread = [bucket for bucket in buckets if not _fits(run, bucket)]
    if not wanted.every or (buckets and not unread):
        return None
    if not unread:
        return (
            f"no validation: {', '.join(run.dataset_names)} has no rows of the split {wanted.split!r}; training goes "
            "on without. To hold some back, raise publish.val_share and give `lumos curate` again"
        )
    shapes = ", ".join(dict.fromkeys("x".join(map(str, bucket.shape)) for bucket in unread))
    left_out, there = (sum(bucket.rows for bucket in some) for some in (unread, buckets))
    return (
        f"validation is without {left_out} rows of {there} ({shapes}): they are longer than model.max_seq_len = "
        f"{run.model.max_seq_len}, or no multiple of data.grid_unit"
    )
