"""What a curation will take, told from a few of its sources: they are curated in a scratch folder, and scaled up."""

import math
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pyarrow as pa

from pipelines import storage
from pipelines.cluster import connect, is_joined
from pipelines.data.config import CurateConfig
from pipelines.data.curate import CONTINUE, prepare
from pipelines.data.snapshot.write import write_snapshot
from pipelines.data.stage.log import RunLog
from pipelines.data.stage.stage import Stage
from pipelines.errors import JobError, UserError, storage_errors_as
from pipelines.memory import sampled_memory
from pipelines.statistics import wilson_interval

_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the run will have."""

    cpus: float  # in all
    gpus: float = 0.0
    price: float = 0.0  # of an hour of all of it, in any currency

    def __post_init__(self) -> None:
        if self.cpus <= 0 or self.gpus < 0 or self.price < 0:
            raise UserError(f"cpus must be positive, gpus and price not negative; got {self}")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage."""

    name: str
    work_s: float  # seconds of work expected in all, at the speed of the processes that did the sample
    workers: int  # processes that the cluster holds

    @property
    def seconds(self) -> float:
        """Expected on the clock."""
        return self.work_s / self.workers


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is expected."""

    sources: int  # in all
    sampled: int  # of these, curated for this plan
    gigabytes: float  # of the sources; 0 where their sizes are not known
    video_hours: float  # in the sources
    kept_share: tuple[float, float, float]  # of the sample's clips, those kept, and the bounds of a 95 % interval
    clips: float  # kept clips expected
    clip_hours: float  # their length
    tokens: float  # their codes
    disk_gb: float  # of the stages' tables and the snapshot
    process_gb: float  # memory that the largest process had (with its decode child), or 0 where it ran elsewhere
    stages: tuple[StagePlan, ...]  # in the order of the work
    caption_cost: float  # of an endpoint's captions
    price_per_hour: float  # of the cluster

    @property
    def hours(self) -> float:
        """Expected on the clock, one stage after another."""
        return sum(stage.seconds for stage in self.stages) / 3600

    def __str__(self) -> str:
        share, low, high = self.kept_share
        lines = [
            f"{self.sources} sources ({_size(self.gigabytes)}, {_time(3600 * self.video_hours)} of video), "
            f"from a sample of {self.sampled}:",
            f"  kept      {100 * share:.0f} % of clips ({100 * low:.0f} to {100 * high:.0f}): "
            f"{self.clips:.3g} clips, {_time(3600 * self.clip_hours)}, {self.tokens:.3g} tokens",
            f"  disk      {_size(self.disk_gb)} for stage tables and snapshot",
        ]
        if self.process_gb:
            lines.append(f"  memory    {_size(self.process_gb)} for each process, its decode child included")
        for stage in self.stages:
            lines.append(
                f"  {stage.name:18s}{_time(stage.work_s):>14s} of work, {stage.workers} processes: "
                f"{_duration(stage.seconds)}"
            )
        cost = self.hours * self.price_per_hour + self.caption_cost
        lines.append(f"  in all    {_duration(3600 * self.hours)}" + (f", costs {cost:.3g}" if cost else ""))
        lines.append("work is counted in this machine's cores, while they shared it with what else ran here")
        return "\n".join(lines)


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.3g} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.3g} MB"


def _time(seconds: float) -> str:
    """Hours, or seconds where they are few."""
    return f"{seconds / 3600:.3g} hours" if seconds >= 360 else f"{seconds:.3g} seconds"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plan_curation(config: CurateConfig, cluster: Cluster, *, sources: int, seed: int = 0) -> Plan:
    """Curate a sample in a scratch folder and scale what it took; raises what ``curate`` does.

    Args:
        config: Of the run that is planned; its dataset is not touched.
        cluster: That the run will have.
        sources: In the sample; drawn over all sizes, as long files take most.
        seed: Of the draw.
    """
    with storage_errors_as(JobError, CONTINUE):
        listing, _ = prepare(config)
        chosen = _draw(listing, sources, seed)
        with _scratch_dataset(config) as folder:
            # Of a sample any share may fail.
            resources = replace(config.resources, max_failed_share=1.0)
            scratch = replace(config, dataset=folder, overrides=None, resources=resources)  # which name other sources
            _, curation = prepare(scratch)
            workers = {name: _workers(stage, cluster) for name, stage in curation.stages.items()}
            with connect(), RunLog(folder).record() as log, sampled_memory(_largest_process, _SAMPLE_SECONDS) as peaks:
                done = curation.run(chosen, log)
                snapshot = write_snapshot(folder, curation.content(done), config.publish)
            disk = sum(file.size for file in storage.list_files(folder))
            ledger = snapshot.read_ledger()
    sampled = _bytes(chosen)  # 0 where sizes are not known
    scale = _bytes(listing) / sampled if sampled else listing.num_rows / chosen.num_rows
    judged = [row for row in ledger.to_pylist() if row["end_s"] is not None]
    kept = [row for row in judged if row["status"] == "kept"]
    totals = snapshot.manifest.totals.values()
    return Plan(
        sources=listing.num_rows,
        sampled=chosen.num_rows,
        gigabytes=_bytes(listing) / 1e9,
        video_hours=scale * sum(row["end_s"] - row["start_s"] for row in judged) / 3600,
        kept_share=(len(kept) / max(1, len(judged)), *wilson_interval(len(kept), len(judged))),
        clips=scale * len(kept),
        clip_hours=scale * sum(row["end_s"] - row["start_s"] for row in kept) / 3600,
        tokens=scale * sum(total.tokens for total in totals),
        disk_gb=scale * disk / 1e9,
        process_gb=max(peaks) / 1e9,
        stages=tuple(
            StagePlan(name=name, work_s=scale * took.busy_s, workers=workers[name]) for name, took in log.stages.items()
        ),
        caption_cost=scale * done.captions.cost(config.captions.endpoint),
        price_per_hour=cluster.price,
    )


def _draw(listing: pa.Table, count: int, seed: int) -> pa.Table:
    """One source out of each of ``count`` parts of the list sorted by size."""
    if count < 1:
        raise UserError(f"sources must be at least 1, got {count}")
    order = np.argsort(listing["size"].to_numpy(), kind="stable")
    generator = np.random.default_rng(seed)
    parts = np.array_split(order, min(count, len(order)))
    return listing.take(pa.array(sorted(int(generator.choice(part)) for part in parts)))


def _bytes(table: pa.Table) -> float:
    return float(np.maximum(table["size"].to_numpy(), 0).sum())


def _workers(stage: Stage, cluster: Cluster) -> int:
    """Processes of a stage that the cluster holds."""
    wants = stage.resources
    fitting = [cluster.cpus / wants.num_cpus] if wants.num_cpus else []
    fitting += [cluster.gpus / wants.num_gpus] if wants.num_gpus else []
    if min(fitting) < 1:
        raise UserError(
            f"no process of the stage {stage.name} fits: under resources it wants {wants.num_cpus:g} CPUs and "
            f"{wants.num_gpus:g} GPUs, the cluster has {cluster.cpus:g} and {cluster.gpus:g}"
        )
    return min(int(min(fitting)), wants.max_workers or int(min(fitting)))


@contextmanager
def _scratch_dataset(config: CurateConfig) -> Iterator[str]:
    """A dataset for a while: on this machine, or beside the real one where a cluster that was joined can reach it."""
    if not is_joined():
        with tempfile.TemporaryDirectory(prefix="lumos-plan-") as folder:
            yield folder
        return
    folder = f"{config.dataset.rstrip('/')}-plan-{secrets.token_hex(4)}"
    try:
        yield folder
    finally:
        storage.remove(folder)


def _largest_process() -> float:
    """Bytes of the largest process of a stage, children included."""
    largest = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if "MapWorker" in " ".join(process.cmdline()):
                family = [process, *process.children(recursive=True)]
                largest = max(largest, float(sum(member.memory_info().rss for member in family)))
    return largest
