"""Loss on held-out rows: the same rows, masks and captions in every run, so that runs compare.

Rows and masks come from streams of the validation's own seed, the mask of a row named by its clip: they depend neither
on the run's seed and mask nor on the number of workers. Captions are the first of each row, none dropped. Nothing that
the training draws or keeps is touched, so its curve is bitwise the same without.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumos.batch import PackedBatch, pack
from lumos.config import MaskConfig
from lumos.layout import SequenceLayout
from lumos.masking import sample_masked_positions
from pipelines.data.snapshot.read import Bucket, Snapshot
from pipelines.streams import numpy_stream, torch_stream
from pipelines.training.config import ValidationConfig
from pipelines.training.engine import Engine
from pipelines.training.ingest import StepLoader
from pipelines.training.prepare import PreparedRun

_MASK = MaskConfig()  # the paper's, whatever the run trains with
_MAX_FRAMES = 256  # latent frames whose losses are told apart


@dataclass(frozen=True)
class HeldOutRow:
    """A row of the validation."""

    dataset: int  # of the run
    bucket: int  # in ``Manifest.buckets`` of that dataset
    row: int  # in the bucket


def choose_rows(datasets: Sequence[Snapshot], config: ValidationConfig) -> list[HeldOutRow]:
    """The rows of the split that a validation takes of some datasets, those of one bucket together."""
    rows = [
        HeldOutRow(dataset, index, row)
        for dataset, snapshot in enumerate(datasets)
        for index, bucket in enumerate(snapshot.manifest.buckets)
        if bucket.split == config.split
        for row in range(bucket.rows)
    ]
    order = numpy_stream(config.seed, "validation").permutation(len(rows))[: config.rows]
    return [rows[index] for index in sorted(order)]


class Validator:
    """One worker's share of every validation. All workers make and call it together."""

    def __init__(self, run: PreparedRun, *, rank: int, device: torch.device) -> None:
        self.run, self.rank, self.device = run, rank, device
        self.rows = choose_rows(run.datasets, run.config.validation) if run.config.validation.every else []
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
        totals = torch.zeros(2, _MAX_FRAMES, dtype=torch.float64, device=self.device)
        engine.eval()
        with torch.no_grad():
            for batch, weight in self._batches:
                num_frames = min(len(batch.layouts[0].frames), _MAX_FRAMES)
                _, sums, counts = engine(batch.to(self.device), num_frames)
                totals[:, :num_frames] += weight * torch.stack([sums, counts])
        engine.train()
        dist.all_reduce(totals)
        sums, counts = totals.tolist()
        frames = sum(1 for count in counts if count)
        return {
            "val_loss": sum(sums) / sum(counts),
            "val_frame_losses": tuple(total / count for total, count in zip(sums[:frames], counts, strict=False)),
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
    """Why there is no validation although one is asked for; None if there is one."""
    wanted = run.config.validation
    if not wanted.every or choose_rows(run.datasets, wanted):
        return None
    return (
        f"no validation: {', '.join(run.dataset_names)} has no rows of the split {wanted.split!r}; training goes on "
        "without"
    )
