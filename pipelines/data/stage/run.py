"""The one runner of all stages: a pure function over rows, made durable.

A stage's output is a table ``stages/<stage>/<hash>/part-*.parquet`` below the dataset; the hash is that of the stage's
configuration. A row's ``work_key`` says which input it was computed from (a fan-out writes several rows of one key).
A run takes the inputs whose key the table does not hold, hands them in batches to Ray workers, and each worker commits
its batch as one file, whole or not at all, under a name derived from the batch's keys. So a run may be killed at any
moment: what was committed counts, the rest is pending. If a worker outlives its run and commits what the next run has
taken up again, readers see each key once.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from tqdm import tqdm

from pipelines import storage
from pipelines.cluster import cluster_cores, cluster_is_ours, lacking
from pipelines.data.stage.blocks import BlockSource
from pipelines.data.stage.columns import contained, release_memory
from pipelines.data.stage.log import BatchReport, RunLog, StageProgress
from pipelines.data.stage.stage import ERROR, WORK, WORK_KEY, RowFunction, Stage, StageResources
from pipelines.data.stage.table import StageTable, anti_join, commit_part
from pipelines.errors import JobError, UserError
from pipelines.storage.lock import check_lock

_WAVE_ROWS = 1 << 17  # inputs handed to Ray at a time, which bounds what its store holds of them
_WAVE_PARTS = 16  # of each process in a wave at least, as at the end of each some wait for others
# Of the first wave, which tells how long a part takes, so that it should not last; but workers that are worth keeping
# begin anew with each wave, and take long for a part.
_FIRST_PARTS = 64
_FIRST_ROWS = 1 << 16
_BLOCK_SECONDS = 2.0  # of work that Ray hands to a worker at once, if that is several parts: each time costs the driver


class StageWorker:
    """What runs in a Ray worker: computes batches of about ``part_rows``, the most by default, and commits each."""

    def __init__(self, stage: Stage, uri: str, part_rows: int | None = None) -> None:
        self.stage = stage
        self.uri = uri
        self.part_rows = part_rows or stage.rows_per_part
        self._function: RowFunction | None = None
        self.lock = threading.Lock()  # Ray may call from several threads

    def __call__(self, block: pa.Table) -> pa.Table:
        """Compute and commit; returns a row for each part, a ``BatchReport``."""
        bounds = pairwise(_part_bounds(self.stage, block, self.part_rows))
        reports = [asdict(self._commit(block.slice(first, last - first))) for first, last in bounds]
        return pa.Table.from_pylist(reports)

    def _commit(self, batch: pa.Table) -> BatchReport:
        begin = time.perf_counter()
        inputs = batch.to_pylist()
        keys = [row[WORK_KEY] for row in inputs]
        with self.lock:
            if self._function is None:  # not in __init__: what an actor raises there reaches nobody as it was
                self._function = self.stage.function(self.uri)
            rows = self._function(inputs)
        covered = {row[WORK_KEY] for row in rows}
        if covered != set(keys):
            raise RuntimeError(f"stage {self.stage.name} left out or made up keys: {sorted(covered ^ set(keys))[:3]}")
        table = commit_part(self.stage, self.uri, rows)
        failures = pc.drop_null(table[ERROR]) if ERROR in table.column_names else pa.array([], pa.string())
        spans = table if "end_s" in table.column_names else batch
        report = BatchReport(
            inputs=len(keys),
            outputs=len(rows),
            failed=len(failures),
            first_failure=failures[0].as_py() if len(failures) else "",
            busy_s=time.perf_counter() - begin,
            source_s=_sum(spans, "end_s") - _sum(spans, "start_s"),
            work=_sum(batch, WORK),
        )
        report.publish(self.stage.name)
        return report


def _sum(table: pa.Table, column: str) -> float:
    return float(pc.sum(table[column]).as_py() or 0.0) if column in table.column_names else 0.0


def run_stage(
    stage: Stage,
    inputs: pa.Table,
    *,
    dataset: str,
    progress: bool = False,
    log: RunLog | None = None,
    max_failed: float = math.inf,
) -> int:
    """Compute what a stage's table lacks.

    Args:
        stage: What to compute.
        inputs: One row per ``work_key``, with the columns its function wants, and perhaps ``work``.
        dataset: Where the table is.
        progress: Whether to show a bar on stderr.
        log: Where to note how far it is.
        max_failed: Inputs that may fail, earlier runs' among them, before the stage stops.

    Returns:
        How many inputs were computed; 0 where all were done before.

    Raises:
        JobError: a worker failed, or too many inputs did. What was committed is kept.
    """
    table = StageTable(dataset, stage)
    done, failed = table.done()
    pending = anti_join(inputs, done)
    before = inputs.num_rows - pending.num_rows
    state = StageProgress(total=inputs.num_rows, before=before, work_total=_sum(pending, WORK))
    failed_before = failed.filter(contained(failed[WORK_KEY], inputs[WORK_KEY]))[ERROR].to_pylist()
    if len(failed_before) > max_failed:
        raise TooManyFailuresError(failed_before[0], len(failed_before))
    if log is not None:
        log.update(stage.name, state, write=pending.num_rows > 0)
    settings = storage.join(table.uri, "stage.json")  # for people: what the hash in the folder's name stands for
    if inputs.num_rows and not storage.exists(settings):
        storage.write_json_atomic(settings, {"stage": stage.name, "settings": stage.settings})
    if pending.num_rows:
        check_fits(stage)
        begin = time.monotonic()
        with tqdm(total=state.total, initial=before, desc=stage.name, unit="row", disable=not progress) as bar:
            for report in _in_waves(stage, table, pending):
                state.add(report, time.monotonic() - begin)
                check_lock(dataset)
                bar.update(report.inputs)
                if log is not None:
                    log.update(stage.name, state)
                if report.failed and len(failed_before) + state.failed > max_failed:
                    raise TooManyFailuresError(report.first_failure, len(failed_before) + state.failed)
    # Every report stands for committed rows; should their numbers not add up, the table itself is asked.
    if state.computed != pending.num_rows and (left := anti_join(inputs, table.keys()).num_rows):
        raise JobError(f"stage {stage.name}: {left} inputs stay pending though their workers reported success")
    return state.computed


class TooManyFailuresError(Exception):
    """More inputs failed than the run bears: one of the failures, and how many there are."""

    def __init__(self, reason: str, count: int) -> None:
        super().__init__(f"{count} inputs failed, such as: {reason}")
        self.reason = reason
        self.count = count


def check_fits(stage: Stage) -> None:
    """Refuse what this machine can never hold; a cluster that was joined may grow.

    Raises:
        UserError: if a process of the stage wants more than there is.
    """
    wants = stage.resources
    needs = {"CPU": wants.num_cpus, "GPU": wants.num_gpus, "memory": 1e6 * (wants.memory_mb or 0.0)}
    lack = lacking([needs])
    if lack and cluster_is_ours():
        raise UserError(
            f"stage {stage.name}: a process wants {lack}, which this machine does not have: lower it under resources, "
            "or set RAY_ADDRESS to a cluster that has it"
        )
    if lack:
        tqdm.write(f"stage {stage.name} waits for a node with {lack}", file=sys.stderr)


def _processes(resources: StageResources) -> int:
    """Processes that a stage may have: what it is allowed, else as many as the cluster can hold."""
    fitting = int(cluster_cores() / resources.num_cpus) if resources.num_cpus else cluster_cores()
    if resources.num_gpus:
        fitting = min(fitting, int(ray.cluster_resources().get("GPU", 0) / resources.num_gpus))
    return max(1, resources.max_workers or fitting)


def _part_bounds(stage: Stage, pending: pa.Table, size: int) -> list[int]:
    """Where parts of about ``size`` rows begin, and where the last one ends."""
    count = pending.num_rows
    if stage.file_column is None:
        return [*range(0, count, size), count]
    files = pending[stage.file_column].combine_chunks()
    remote = pc.and_not(pc.match_substring(files, "://"), pc.starts_with(files, "file://"))
    same_file = pc.and_(pc.equal(files[1:], files[:-1]), remote[1:]).to_numpy(zero_copy_only=False)
    begins = np.flatnonzero(np.concatenate([[True], ~same_file, [True]]))  # where a part may, and the end
    bounds = [0]
    while bounds[-1] < count:
        most = min(bounds[-1] + stage.rows_per_part, count)
        later = begins[np.searchsorted(begins, min(bounds[-1] + size, count))]
        earlier = begins[np.searchsorted(begins, most, side="right") - 1]
        bounds.append(int(later if later <= most else earlier if earlier > bounds[-1] else most))
    return bounds


def _in_waves(stage: Stage, table: StageTable, pending: pa.Table) -> Iterator[BatchReport]:
    """Compute; yields what is told of each part once it is committed."""
    start, seconds = 0, math.inf  # that a part takes
    enough = _WAVE_PARTS * _processes(stage.resources) * stage.rows_per_part
    first = max(_FIRST_ROWS, enough) if stage.stateful else _FIRST_PARTS * stage.rows_per_part
    while start < pending.num_rows:
        wave = pending.slice(start, max(_WAVE_ROWS, enough) if start else first)
        start += wave.num_rows
        spent = []
        for report in _execute(stage, table, wave, parts=max(1, int(_BLOCK_SECONDS / seconds))):
            spent.append(report.busy_s)
            yield report
        seconds = max(1e-3, sum(spent) / max(1, len(spent)))
        release_memory()  # that the wave took


def _execute(stage: Stage, table: StageTable, pending: pa.Table, *, parts: int) -> Iterator[BatchReport]:
    """Run one wave; a worker is handed so many parts at a time, or fewer where there would be no work for others."""
    resources = stage.resources
    processes = _processes(resources)
    # Enough parts that workers end at about the same time, few enough that commits cost little.
    even = math.ceil(pending.num_rows / (4 * processes))
    size = min(stage.rows_per_part, max(stage.min_rows_per_part, even))
    bounds = _part_bounds(stage, pending, size)
    together = min(parts, math.ceil((len(bounds) - 1) / (4 * processes)))
    # `take` copies: a slice would drag the whole table along when it is pickled.
    ends = [*bounds[:-1][::together], pending.num_rows]
    blocks = [pending.take(pa.array(np.arange(*own))) for own in pairwise(ends)]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells the plan of every execution, and errors twice
    most = min(processes, len(blocks))  # each begins with a second of imports
    wants: dict[str, Any] = {"num_cpus": resources.num_cpus}
    if resources.num_gpus:
        wants["num_gpus"] = resources.num_gpus
    if resources.memory_mb:
        wants["memory"] = resources.memory_mb * 1_000_000
    rows = None  # in a call
    if resources.num_gpus:
        # Ray wants a number, and then reads apart from computing: a reader with these wants would hold the only GPU.
        rows = max(block.num_rows for block in blocks)
        stored: Any = [ray.put(block) for block in blocks]
        data: ray.data.Dataset = ray.data.from_arrow_refs(stored)
    else:
        # Equal wants and numbers: only then the process that computes a block is also the one that reads it.
        source = BlockSource(blocks)
        data = ray.data.read_datasource(source, concurrency=most, override_num_blocks=len(blocks), **wants)
    options: dict[str, Any] = {"batch_size": rows, "batch_format": "pyarrow"} | wants
    if stage.stateful:
        pool = ray.data.ActorPoolStrategy(min_size=min(resources.min_workers, most), max_size=most)
        data = data.map_batches(StageWorker, fn_constructor_args=(stage, table.uri, size), compute=pool, **options)
    else:
        data = data.map_batches(lambda block: StageWorker(stage, table.uri, size)(block), concurrency=most, **options)
    data.context.enable_progress_bars = False  # ours count rows, across waves
    data.context.raise_original_map_exception = True
    data.context.execution_no_progress_timeout_s = -1  # one batch may hold hours of film; decoding has its own bounds
    try:
        for row in data.iter_rows():
            yield BatchReport(**row)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        message = str(cause).partition("\nFailed to apply UDF")[0].strip()[-2000:]  # Ray adds advice on its settings
        if isinstance(cause, UserError):
            raise UserError(message) from error
        raise JobError(
            f"stage {stage.name} stopped: {type(cause).__name__}: {message}\n"
            "what was committed is kept; give the same command again to continue"
        ) from error
