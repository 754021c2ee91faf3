"""What a training run will take, before it starts: FLOPs, memory, time, storage, by the formulas that give MFU.

Nothing is run and no weight is made. Where the run's dataset cannot be read, the shapes of its rows are told.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from lumos.flops import (
    ParameterCounts,
    StepFlops,
    Workload,
    count_parameters,
    dense_flops,
    exact_flops,
    mean_mask_ratio,
)
from lumos.layout import TAIL, video_layout
from pipelines.errors import UserError
from pipelines.training.config import TrainConfig
from pipelines.training.device_memory import Memory, Pass, Setup, trained, worker_memory
from pipelines.training.engine import check_engine, read_deepspeed_file
from pipelines.training.plan_question import Question, Rows
from pipelines.training.precision import with_precision

_HEADER = 5  # tokens of markup before the first frame
_RESERVED_BYTES = 1.5e9  # of a device: CUDA's context, libraries' workspaces
_USABLE = 0.95  # of what is left: the allocator's gaps take the rest
_LOADER_BYTES = 1e9  # of a worker's host: its loader's tables and prepared batches
_PROCESS_BYTES = 4e9  # of a worker's host: Python, torch, CUDA's libraries, its loader's process


# That a GET request gives at least, of shuffled reading by 48 workers (tests/pipelines/storage/test_s3_reading.py).
ROWS_PER_READ = 5


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """Steps whose rows have one shape."""

    rows: Rows
    share: float  # of the steps
    rows_per_step: int
    rows_per_pass: int
    tokens_per_row: int
    bare_tokens: int  # of a row without its caption
    exact: StepFlops  # of a step, all workers together
    dense: StepFlops
    memory: Memory  # of a worker

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows_per_step * self.tokens_per_row


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is expected of a run; :func:`make_plan` makes it."""

    question: Question
    config: TrainConfig

    @cached_property
    def setup(self) -> Setup:
        """How the config has memory used."""
        return setup_of(self.config)

    @cached_property
    def counts(self) -> ParameterCounts:
        """Of the model."""
        return count_parameters(self.question.model, visual_classes=self.question.codebook_size)

    @cached_property
    def buckets(self) -> tuple[BucketPlan, ...]:
        """One for each shape of rows."""
        return tuple(_buckets(self))

    @cached_property
    def fitting(self) -> tuple[tuple[str, float], ...]:
        """Where it does not fit: changes with which it would, and their peak."""
        return () if self.fits else tuple(_remedies(self))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person may not have meant."""
        if self.setup.on_gpu:
            return ()
        return (
            f"planned as on CPUs, with float32 parameters and deepspeed={self.config.deepspeed}, since the config has "
            "resources.device=cpu: if these are GPUs, add resources.device=gpu deepspeed=zero1-gpu",
        )

    @property
    def grounds(self) -> tuple[str, ...]:
        """What of one machine the figures are computed from, and what nobody measured."""
        return (
            f"time: an MFU of {self.question.mfu:.0%} (--mfu), which no measurement gave unless you did one: train "
            "some steps on one node of these devices, and give the mfu_exact of its metrics",
            "memory of a device: formulas, within 15% of what steps took on a CPU "
            "(tests/pipelines/training/memory_steps.py)",
            f"requests: {ROWS_PER_READ} rows a GET, counted on one machine in the reading of 48 workers "
            "(tests/pipelines/storage/test_s3_reading.py)",
            "network, disk and host memory: arithmetic, of parameters and workers; links and disks were not measured",
        )

    @property
    def peak(self) -> BucketPlan:
        """The shape that takes most memory."""
        return max(self.buckets, key=lambda bucket: bucket.memory.peak)

    @property
    def room(self) -> float:
        """Bytes of a device that a run may take."""
        return _USABLE * (self.question.cluster.device.memory_gb * 1e9 - _RESERVED_BYTES)

    @property
    def fits(self) -> bool:
        """Whether every shape has room."""
        return self.peak.memory.peak <= self.room

    def mean(self, of: str) -> float:
        """Mean over the steps of a figure of their buckets, such as ``exact.model``."""
        figure = attrgetter(of)
        return float(sum(bucket.share * figure(bucket) for bucket in self.buckets))

    @property
    def peak_flops(self) -> float:
        """Of a device, in the run's precision."""
        return self.question.cluster.device.flops(self.config.precision)

    @property
    def step_seconds(self) -> float:
        """At the MFU asked for."""
        return self.mean("exact.model") / (self.question.mfu * self.question.cluster.count * self.peak_flops)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.mean("tokens") / self.step_seconds

    @property
    def steps(self) -> int:
        """Of the token budget, or of the config."""
        budget = self.question.tokens
        return self.config.steps if budget is None else math.ceil(budget / self.mean("tokens"))

    @property
    def days(self) -> float:
        """For these steps."""
        return self.steps * self.step_seconds / 86400

    @property
    def epochs(self) -> float | None:
        """Passes over the dataset in these steps; None where it is not known."""
        if self.question.dataset_bytes is None:
            return None
        return self.steps * self.mean("rows_per_step") / sum(rows.weight for rows in self.question.rows)

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint."""
        size = trained(self.counts, self.setup)
        return size * (self.setup.parameter_bytes + 12 + 4 * self.setup.ema) + 4 * (self.counts.total - size)

    @property
    def network_bytes(self) -> float:
        """That a device sends in a step: gradients in float32, weights gathered."""
        if self.question.cluster.count == 1:
            return 0.0
        size, width = trained(self.counts, self.setup), self.setup.parameter_bytes
        gradients = {0: 8, 1: 8, 2: 4, 3: 4}[self.setup.stage]  # all-reduced, or each part to its owner
        gathered = {0: 0, 1: width, 2: width, 3: 2 * width}[self.setup.stage]  # after the update, or in both passes
        return float(size * (gradients + gathered))

    @property
    def read_bytes_per_s(self) -> float:
        """Of codes, two bytes each; captions are few beside them."""
        visual = sum(bucket.share * bucket.rows_per_step * math.prod(bucket.rows.shape) for bucket in self.buckets)
        return 2 * visual / self.step_seconds

    @property
    def nodes(self) -> int:
        """Machines that hold the devices."""
        return math.ceil(self.question.cluster.count / self.question.devices_per_node)

    @property
    def node_disk_bytes(self) -> float:
        """Of scratch on the node that has most: its share of two checkpoints, one written and one being sent."""
        size, width = trained(self.counts, self.setup), self.setup.parameter_bytes
        weights = size * width + 4 * (self.counts.total - size)  # by rank 0
        return 2 * (weights + (self.checkpoint_bytes - weights) / self.nodes)

    @property
    def s3_reads_per_s(self) -> float:
        """GET requests of all workers at most, if the datasets lie in S3."""
        return self.mean("rows_per_step") / ROWS_PER_READ / self.step_seconds

    @property
    def node_memory(self) -> dict[str, float]:
        """Host memory of a node by part."""
        workers = min(self.question.devices_per_node, self.question.cluster.count)
        parts = {f"offloaded {name}": size for name, size in self.buckets[0].memory.host.items()}
        parts |= {"processes": _PROCESS_BYTES, "loaders": _LOADER_BYTES}
        return {name: workers * size for name, size in parts.items()}


def make_plan(config: TrainConfig, question: Question) -> Plan:
    """Work a run out.

    Raises:
        UserError: if the config's batch does not divide among the cluster's devices, or a run of it is refused.
    """
    if question.cluster.count != config.num_workers:
        try:
            config = replace(config, num_workers=question.cluster.count)
        except ValueError as error:
            raise UserError(f"on {question.cluster.count} devices: {error}") from error
    config = with_precision(config)
    check_engine(config)
    plan = Plan(question=question, config=config)
    _ = plan.buckets  # which refuses rows that cannot be trained on
    return plan


def setup_of(config: TrainConfig) -> Setup:
    """How a run's config has its memory used."""
    in_bf16 = config.precision == "bf16" and config.resources.device == "gpu"
    return Setup(
        zero=read_deepspeed_file(config.deepspeed).get("zero_optimization", {}),
        workers=config.num_workers,
        parameter_bytes=2 if in_bf16 else 4,
        on_gpu=config.resources.device == "gpu",
        recompute=config.model.recompute,
        muon=config.optimizer.kind == "muon",
        ema=config.ema is not None,
        train_text=config.optimizer.text_loss_weight > 0,
    )


def _buckets(plan: Plan) -> Iterator[BucketPlan]:
    config, question, setup = plan.config, plan.question, plan.setup
    ratio = mean_mask_ratio(config.mask)
    for rows, share in zip(question.rows, _shares(config, question.rows), strict=True):
        per_step = config.batch_rows(rows.shape[0])
        bare = video_layout(_HEADER, rows.shape, tail=TAIL)
        if bare.length > config.micro_batch_tokens:
            raise UserError(
                f"micro_batch_tokens = {config.micro_batch_tokens} is less than the {bare.length} tokens of a row of "
                f"{rows}: set it to at least {bare.length}"
            )
        if bare.length > question.model.max_seq_len:
            raise UserError(
                f"a row of {rows} has {bare.length} tokens and more, model.max_seq_len is "
                f"{question.model.max_seq_len}: raise it, or plan for smaller rows"
            )
        caption = min(question.caption_tokens, question.model.max_seq_len - bare.length)  # longer ones are cut
        layout = video_layout(_HEADER + caption, rows.shape, tail=TAIL)
        per_pass = max(1, min(per_step // config.num_workers, config.micro_batch_tokens // bare.length))
        one = Workload.of([layout], visual_predictions=ratio * math.prod(rows.shape))
        step = one.times(per_step)
        yield BucketPlan(
            rows=rows,
            share=share,
            rows_per_step=per_step,
            rows_per_pass=per_pass,
            tokens_per_row=layout.length,
            bare_tokens=bare.length,
            exact=exact_flops(question.model, step, visual_classes=question.codebook_size, recompute=setup.recompute),
            dense=dense_flops(question.model, step),
            memory=worker_memory(
                question.model, plan.counts, setup, Pass(per_pass * layout.length, per_pass * one.visual_predictions)
            ),
        )


def _shares(config: TrainConfig, rows: Sequence[Rows]) -> list[float]:
    """Share of the steps of each shape: by the mixture between kinds, by their number within one."""
    steps = [each.weight / config.batch_rows(each.shape[0]) for each in rows]
    if config.data.mix is None:
        return [step / sum(steps) for step in steps]
    by_kind: Counter[str] = Counter()
    for each, step in zip(rows, steps, strict=True):
        by_kind[each.kind] += step  # type: ignore[assignment]
    wanted = {kind: getattr(config.data.mix, kind) or 0.0 for kind in by_kind}
    total = sum(wanted.values())
    if not total:
        raise UserError(f"data.mix asks for other rows than {', '.join(by_kind)}: give --rows of those kinds")
    return [wanted[each.kind] / total * step / by_kind[each.kind] for step, each in zip(steps, rows, strict=True)]


def _remedies(plan: Plan) -> Iterator[tuple[str, float]]:
    """Changes of keys with which the largest shape would have room, the mildest first, and their peak."""
    config = plan.config
    recompute: dict[str, list[Any]] = {"none": ["selective", True], "selective": [True], "full": []}
    longest = max(bucket.bare_tokens for bucket in plan.buckets)
    fewer = sorted({max(longest, config.micro_batch_tokens // 2), longest}, reverse=True)
    fewer = fewer if plan.peak.rows_per_pass > 1 else []
    suffix = "-gpu" if plan.setup.on_gpu else ""
    zeros = [f"zero{stage}{suffix}" for stage in (1, 2, 3) if stage > plan.setup.stage]
    choices: list[dict[str, Any]] = [{"micro_batch_tokens": tokens} for tokens in fewer]
    choices += [{"model.checkpoint_activations": value} for value in recompute[plan.setup.recompute]]
    choices += [{"deepspeed": name} for name in zeros]
    strongest = {"model.checkpoint_activations": True, **({"micro_batch_tokens": fewer[-1]} if fewer else {})}
    offloading = ["zero2-offload-gpu", "zero3-offload-gpu"] if plan.setup.on_gpu else []
    choices += [strongest] if fewer else []
    choices += [{**strongest, "deepspeed": name} for name in (*zeros, *offloading)]
    for changes in choices:
        tried = _changed(config, changes)
        try:
            check_engine(tried)
        except UserError:
            continue
        peak = replace(plan, config=tried).peak.memory.peak
        if peak <= plan.room:
            yield " ".join(f"{key}={str(value).lower()}" for key, value in changes.items()), peak


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        value = replace(getattr(config, section), **{name: value}) if section else value
        config = replace(config, **{section or name: value})
    return config
