"""One global step: forward, backward and update over the micro-batches of every worker, and its figures.

The loss of a step is the sum over the masked visual tokens of the whole global batch divided by their number, so it
does not depend on how the batch was divided.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lumos.batch import PackedBatch, pack
from lumos.vocabulary import Vocabulary
from pipelines.training.diagnosis import PhaseClock
from pipelines.training.engine import Engine


@dataclass(frozen=True)
class StepBatch:
    """All micro-batches of one worker in one step."""

    step: int  # 0-based
    epoch: int
    micro_batches: tuple[PackedBatch, ...]  # as many on every worker, but not in every step
    shape: tuple[int, int, int]  # latent [t, h, w] of every row
    dataset: int  # that all rows are from: its number in ``PreparedRun.datasets``
    rows: int  # of all workers
    cut_captions: int  # of this worker's rows: captions cut to what the model can read
    longest_caption: int  # of this worker's rows: tokens of the longest prompt before it was cut
    idle: int = 0  # micro-batches at the end that count nothing: rows that do not divide evenly among workers

    @property
    def counted(self) -> tuple[PackedBatch, ...]:
        """The micro-batches that the loss is taken over."""
        return self.micro_batches[: len(self.micro_batches) - self.idle]


@dataclass(frozen=True)
class StepResult:
    """Figures of one global step, the same on every worker."""

    loss: float
    frame_losses: tuple[float, ...]  # by latent frame
    grad_norm: float  # before clipping; with Muon, its updates stand in for its gradients
    tokens: int  # of all documents, markup and text included
    masked_tokens: int  # visual tokens the loss was taken over
    masked_share: float  # masked grid cells among all, row ends included
    data_wait: float  # seconds a worker stood waiting for its batch, mean over workers
    skipped: int  # 1: loss or gradients were not finite, weights and optimizer are as before
    clips: int  # rows, of all workers
    bucket: str  # their latent shape, TxHxW
    cut_captions: int  # captions cut to what the model can read
    longest_caption: int  # where captions were cut: tokens of the longest prompt before


class TrainStep:
    """Runs global steps on an engine."""

    def __init__(
        self, engine: Engine, vocabulary: Vocabulary, *, device: torch.device, clock: PhaseClock | None = None
    ) -> None:
        self.clock = clock or PhaseClock(device)
        self.engine = engine
        self.vocabulary = vocabulary
        self.device = device
        self.world_size = dist.get_world_size()
        self.signal = 0.0  # what rank 0 sets before a step, all workers have after it

    def __call__(self, batch: StepBatch, *, lr: float, data_wait: float) -> StepResult:
        """One update with this worker's micro-batches, whose rows have one latent shape.

        A step whose loss or gradients are not finite is skipped. ``data_wait``, the seconds this worker waited for the
        batch, is for the record.
        """
        packed = [pack(x.ids, x.masked_positions, x.layouts, self.vocabulary) for x in batch.micro_batches]
        counted = len(batch.counted)
        # Known before any device is.
        predicted = sum(len(x.loss_frames) for x in packed[:counted] if x.loss_frames is not None)
        micro_batches = [x.to(self.device) for x in packed]
        num_frames = len(micro_batches[0].layouts[0].frames)
        count = self._sum(torch.tensor(float(predicted)))
        scale = self.world_size / count  # DeepSpeed averages over workers; multiplying undoes it
        totals = torch.zeros(2, num_frames, dtype=torch.float64, device=self.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        for index, micro in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches))
            with self.clock("forward"):
                loss, sums, counts = self.engine(micro, num_frames)
            weight = float(index <= counted)
            totals += weight * torch.stack([sums, counts])
            # A loss so far that is no number makes every gradient one, on all workers alike once they are reduced, even
            # where its own gradients happen to be finite: what is decided on the gradients is decided on both.
            finite = 1.0 + 0.0 * totals[0].sum().float()
            with self.clock("backward"):
                self.engine.backward(loss * (scale * weight) * finite, scale_wrt_gas=False)
        with self.clock("optimizer"):
            grad_norm, updated = self._update()
        return self._result(batch, totals, data_wait, grad_norm=grad_norm, updated=updated)

    def _update(self) -> tuple[float, bool]:
        """Make the update unless gradients are not finite; their norm, and whether it was made.

        The norm is over the reduced gradients, so every worker decides alike. Where it is no number, nothing but the
        gradients, which are dropped, is touched: neither weights nor the optimizer's state and count of steps.
        """
        if self.engine.zero_optimization_stage() == 0:  # DeepSpeed keeps no norm then, and would make any update
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm, False
            self.engine.step()
            return norm, True
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), bool(self.engine.was_step_applied())

    def _result(
        self,
        batch: StepBatch,
        totals: Tensor,
        data_wait: float,
        *,
        grad_norm: float,
        updated: bool,
    ) -> StepResult:
        micro_batches = batch.counted
        cells = sum(frame.grid_size for micro in micro_batches for doc in micro.layouts for frame in doc.frames)
        masked = sum(int(micro.masked_positions.sum()) for micro in micro_batches)
        tokens = sum(len(micro.ids) for micro in micro_batches)
        own = torch.tensor(
            [tokens, cells, masked, data_wait, batch.cut_captions], dtype=torch.float64, device=self.device
        )
        signal = own.new_tensor([self.signal])
        *flat, self.signal = self._sum(torch.cat([own, totals.flatten(), signal])).tolist()
        sums, counts = flat[5 : 5 + totals.shape[1]], flat[5 + totals.shape[1] :]
        return StepResult(
            loss=sum(sums) / sum(counts),
            frame_losses=tuple(s / max(c, 1.0) for s, c in zip(sums, counts, strict=True)),
            grad_norm=grad_norm,
            tokens=int(flat[0]),
            masked_tokens=int(sum(counts)),
            masked_share=flat[2] / flat[1],
            data_wait=flat[3] / self.world_size,
            skipped=int(not updated),
            clips=batch.rows,
            bucket="x".join(map(str, batch.shape)),
            cut_captions=int(flat[4]),
            longest_caption=self._longest(batch) if flat[4] else 0,
        )

    def _longest(self, batch: StepBatch) -> int:
        longest = torch.tensor(batch.longest_caption, device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return int(longest)

    def _sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values
