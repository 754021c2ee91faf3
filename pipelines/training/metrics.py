"""The metrics of a training run as MLflow gets them, made of the record: one table of names, and a stream.

With ``tracking.log_every`` = N there is one row for every N steps, at the last of them; ``metrics.jsonl`` has each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lumos.config import ModelConfig
from lumos.flops import Workload, dense_flops, exact_flops
from lumos.layout import video_layout
from pipelines.tracking import MetricRow
from pipelines.training.record import StepRecord

# name: what it is, and what stands for the steps of one row. XX is a latent frame from 00 on, TxHxW a latent shape.
METRICS: Mapping[str, str] = {
    "loss": "nats per masked visual token of the global batch; mean over the steps of the row",
    "loss_frame_N": "the same of latent frame N, from 0 on; mean over the steps that have it",
    "perplexity": "exp(loss)",
    "lr": "learning rate of AdamW; last step",
    "lr_muon": "learning rate of Muon; last step",
    "grad_norm": "global norm of the gradients before clipping; mean",
    "masked_share": "masked cells among all; mean",
    "masked_tokens": "tokens that the loss was taken over; mean of a step",
    "tokens": "tokens of the global batch, text and markup included; mean of a step",
    "tokens_seen": "the same, since the first step",
    "clips_seen": "clips and images trained on since the first step",
    "epoch": "passes over the data, a fraction",
    "tokens_per_s": "tokens by seconds of the steps",
    "tokens_per_s_per_device": "the same, by the number of workers",
    "mfu": "share of the devices' peak in the run's precision: 6 FLOPs per parameter and token, attention on all pairs",
    "mfu_exact": "the same of what mask and loss ask for: block-causal attention, head on masked visual tokens",
    "step_seconds": "seconds of a step, without checkpoints and validation; mean",
    "data_wait": "seconds of a step in which a worker waited for data; mean",
    "data_wait_share": "the same as a share of the step",
    "seconds_data": "seconds of rank 0 in a part of the step, waiting for data; mean",
    "seconds_forward": "likewise",
    "seconds_backward": "likewise",
    "seconds_optimizer": "likewise, updates and what they exchange between workers",
    "checkpoint_seconds": "seconds that saving held training up, at each checkpoint; sum",
    "memory_gb": "peak memory of rank 0's device since its start, GB; highest",
    "rss_gb": "peak resident memory of rank 0's process, GB; highest",
    "skipped_steps": "updates left out since loss or gradients were not finite, since the first step",
    "cut_captions": "captions that did not fit, since the first step",
    "restarts": "starts of the workers after the first, at the step at which they went on",
    "steps_of/TxHxW": "steps of the bucket, since the first step",
    "rows_of/DATASET": "rows of the dataset, since the first step",
    "val/loss": "of the held-out rows under fixed masks and captions, at the step of the validation",
    "val/perplexity": "exp(val/loss)",
    "val/frame_XX": "val/loss of latent frame XX",
    "val/seconds": "how long the validation took",
    "samples/NAME": "of the videos sampled beside the training, by the judge or CLIP",
    "sampling_choice/XX": "the same, mean over the prompts of sampling_choice; 00 as configured, XX a candidate",
}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What of a run its metrics depend on."""

    model: ModelConfig
    codebook_size: int
    num_rows: int  # in an epoch
    muon_factor: float | None  # learning rate of Muon by that of AdamW; None without Muon
    workers: int  # for records that do not say


@dataclass(kw_only=True)
class MetricStream:
    """Turns records into rows of metrics, one after another from the first step."""

    facts: RunFacts
    log_every: int
    peak_flops: float | None = None  # of one device; None: no MFU
    complete: int = 0  # the last step that is in a row, or was skipped
    _group: list[StepRecord] = field(default_factory=list)
    _totals: Counter[str] = field(default_factory=Counter)

    def skip(self, record: StepRecord) -> None:
        """Count a record whose row was sent."""
        self._count(record)
        self.complete = record.step

    def _count(self, record: StepRecord) -> None:
        totals = self._totals
        totals["tokens_seen"] += record.tokens
        totals["clips_seen"] += record.clips
        totals["skipped_steps"] += record.skipped
        totals["cut_captions"] += record.cut_captions
        if record.bucket:
            totals[f"steps_of/{record.bucket}"] += 1
        for dataset, rows in record.datasets.items():
            totals[f"rows_of/{dataset}"] += rows

    def add(self, record: StepRecord) -> Iterator[MetricRow]:
        """The rows that a record completes."""
        self._count(record)
        self._group.append(record)
        if record.val_loss is not None:
            yield MetricRow(record.step, record.time, _validation(record))
        if record.step % self.log_every == 0:
            yield from self.flush()

    def flush(self) -> Iterator[MetricRow]:
        """The row of the steps that are no whole group, as at the end of a run."""
        if self._group:
            last = self._group[-1]
            values = {name: value for name, value in self._values(self._group).items() if math.isfinite(value)}
            yield MetricRow(last.step, last.time, values)
            self._group.clear()
            self.complete = last.step

    def _values(self, group: Sequence[StepRecord]) -> dict[str, float]:
        last, seconds = group[-1], sum(record.step_seconds for record in group)
        good = [record for record in group if not record.skipped] or group
        values = {
            "lr": last.lr,
            "tokens_per_s": last.tokens_per_s if len(group) == 1 else sum(r.tokens for r in group) / seconds,
            "checkpoint_seconds": sum(record.checkpoint_seconds for record in group),
            "epoch": self._totals["clips_seen"] / self.facts.num_rows if last.clips else float(last.epoch),
            **{name: float(total) for name, total in self._totals.items()},
        }
        for name in ("loss", "grad_norm"):
            values[name] = _mean([getattr(record, name) for record in good])
        for name in ("masked_share", "masked_tokens", "tokens", "step_seconds", "data_wait"):
            values[name] = _mean([getattr(record, name) for record in group])
        for index in range(max(len(record.frame_losses) for record in good)):
            values[f"loss_frame_{index}"] = _mean([r.frame_losses[index] for r in good if len(r.frame_losses) > index])
        for part in {part for record in group for part in record.phases}:
            values[f"seconds_{part}"] = _mean([r.phases[part] for r in group if part in r.phases])
        for name in ("memory_gb", "rss_gb"):
            values |= {name: highest} if (highest := max(getattr(record, name) for record in group)) else {}
        if self.facts.muon_factor is not None:
            values["lr_muon"] = last.lr * self.facts.muon_factor
        values["perplexity"] = _exp(values["loss"])
        values["data_wait_share"] = sum(record.data_wait for record in group) / seconds
        devices = last.workers or self.facts.workers
        values["tokens_per_s_per_device"] = values["tokens_per_s"] / devices
        if self.peak_flops is not None and all(record.bucket for record in group):
            exact, dense = (sum(flops) for flops in zip(*map(self._flops, group), strict=True))
            values["mfu_exact"] = exact / seconds / devices / self.peak_flops
            values["mfu"] = dense / seconds / devices / self.peak_flops
        return values

    def _flops(self, record: StepRecord) -> tuple[float, float]:
        """FLOPs of a step as mask and loss ask for, and by the usual count; its captions taken as of equal length."""
        shape = tuple(map(int, record.bucket.split("x")))
        assert len(shape) == 3
        header = max(0, round(record.tokens / record.clips) - video_layout(0, shape).length)
        masked = record.masked_tokens / record.clips
        work = Workload.of([video_layout(header, shape)], visual_predictions=masked).times(record.clips)
        exact = exact_flops(self.facts.model, work, visual_classes=self.facts.codebook_size)
        return exact.model, dense_flops(self.facts.model, work).model


def _validation(record: StepRecord) -> dict[str, float]:
    assert record.val_loss is not None
    frames = {f"val/frame_{index:02d}": loss for index, loss in enumerate(record.val_frame_losses)}
    values = {"val/loss": record.val_loss, "val/perplexity": _exp(record.val_loss), "val/seconds": record.val_seconds}
    return {name: value for name, value in (values | frames).items() if math.isfinite(value)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
