"""The one runner of all stages: a pure function over rows, made durable.

A stage's output is a table ``stages/<stage>/<hash>/part-*.parquet`` below the dataset; the hash is that of the stage's
configuration. A row's ``work_key`` says which input it was computed from (a fan-out writes several rows of one key).
A run takes the inputs whose key the table does not hold, hands them in batches to Ray workers, and each worker commits
its batch as one file, whole or not at all, under a name derived from the batch's keys. So a run may be killed at any
moment: what was committed counts, the rest is pending. If a worker outlives its run and commits what the next run has
taken up again, readers see each key once.
"""

import hashlib
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines import storage
from pipelines.cluster import cluster_cores, cluster_is_ours, lacking
from pipelines.config import config_hash
from pipelines.data.settings import StageResources
from pipelines.data.snapshot.write import parquet_bytes
from pipelines.data.stage.log import BatchReport, RunLog, StageProgress
from pipelines.errors import JobError, UserError

Row = dict[str, Any]
RowFunction = Callable[[list[Row]], list[Row]]

STAGES = "stages"
WORK_KEY = "work_key"
WORK = "work"  # column that inputs may have: how much work each is, in whatever measure; for the time left
ERROR = "error"  # column of a table whose inputs may fail
PART = "part"  # column that any table has when it is read: number of the file, among ``StageTable.parts``
_WAVE_ROWS = 1 << 16  # inputs handed to Ray at a time, which bounds what the driver holds
PART_ROW_GROUP = 1 << 12
_READERS = 16  # threads, as a store takes long to answer
_PIECE_ROWS = 1 << 16
_PIECE_BYTES = 1 << 27
_PART_FIELD = pa.field(PART, pa.int32())


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pure function over rows, and what its table is named by.

    Attributes:
        name: Folder of its tables.
        settings: All that its output depends on besides the rows, as JSON-able values; its hash names the table.
        schema: Columns of the output, ``work_key`` among them.
        function: Picklable; given the URI of the stage's folder for side records, returns the function over a batch
            of rows. Called once in each worker process, so models load there.
        rows_per_part: Rows in one batch, at most; what is lost when a worker dies.
        min_rows_per_part: Rows below which a batch is not worth another worker.
        resources: What each worker holds, and how many there may be.
        stateful: Whether workers are worth keeping (they hold a model or a child process).
    """

    name: str
    settings: dict[str, Any]
    schema: pa.Schema
    function: Callable[[str], RowFunction]
    rows_per_part: int
    min_rows_per_part: int = 1
    resources: StageResources = field(default_factory=StageResources)
    stateful: bool = True

    @property
    def hash(self) -> str:
        """Name of the configuration."""
        return config_hash({"stage": self.name, **self.settings})


class StageTable:
    """The committed rows of one stage and configuration."""

    def __init__(self, dataset: str, stage: Stage) -> None:
        self.uri = storage.join(dataset, STAGES, stage.name, stage.hash)
        self.schema = stage.schema

    def parts(self) -> list[str]:
        """URIs of the committed files, sorted."""
        return table_parts(self.uri)

    def keys(self) -> pa.Array:
        """All keys that are done."""
        chunks = [chunk for table in read_parts(self.parts(), [WORK_KEY]) for chunk in table[WORK_KEY].chunks]
        return pc.unique(pa.chunked_array(chunks, type=pa.string()))

    def failures(self, keys: pa.ChunkedArray) -> list[str]:
        """Failures of these keys."""
        if ERROR not in self.schema.names:
            return []
        pieces = self.pieces([ERROR], keys, may_lack=True)
        return [error for _, rows in pieces for error in rows[ERROR].drop_null().to_pylist()]

    def pieces(
        self, columns: Sequence[str], keys: pa.Array | pa.ChunkedArray, *, may_lack: bool = False
    ) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """The rows of some keys, each key's from one part, some parts at a time; memory holds one piece.

        Args:
            columns: Wanted columns; ``PART`` may be among them.
            keys: No key twice.
            may_lack: Whether keys may be pending.

        Yields:
            For each row the place of its key among ``keys``, and the rows: ``work_key`` and ``columns``.

        Raises:
            JobError: the table lacks a key.
        """
        schema = pa.schema([self.schema.field(name) for name in dict.fromkeys([WORK_KEY, *columns]) if name != PART])
        wanted = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        seen = np.zeros(len(wanted) + 1, bool)
        seen[-1] = True  # where -1, the place of what is not wanted, leads
        read = (table.cast(schema) for table in read_parts(self.parts(), schema.names))
        if PART in columns:
            read = (_numbered(table, number) for number, table in enumerate(read))
        for tables in _grouped(read):
            group = pa.concat_tables(tables)
            places = pc.fill_null(pc.index_in(group[WORK_KEY], wanted), -1).to_numpy().astype(np.int64)
            chosen = np.zeros(group.num_rows, bool)
            start = 0
            for table in tables:
                own = slice(start, start + table.num_rows)
                chosen[own] = ~seen[places[own]]
                seen[places[own]] = True
                start = own.stop
            if chosen.any():
                yield places[chosen], group.filter(pa.array(chosen))
        pa.default_memory_pool().release_unused()
        if not may_lack and not seen.all():
            example = wanted[int(np.flatnonzero(~seen)[0])]
            raise JobError(
                f"{self.uri} lacks {(~seen).sum()} of {len(wanted)} rows, such as that of {example}: files of it were "
                "deleted meanwhile; give the same command again"
            )

    def read(self, columns: Sequence[str] | None = None, keys: pa.Array | pa.ChunkedArray | None = None) -> pa.Table:
        """All rows (or those of some keys), each key's from one part."""
        wanted = list(columns if columns is not None else self.schema.names)
        every = self.schema.append(_PART_FIELD)
        schema = pa.schema([every.field(name) for name in dict.fromkeys([WORK_KEY, *wanted])])
        tables = [rows for _, rows in self.pieces(wanted, self.keys() if keys is None else keys)]
        return pa.concat_tables([schema.empty_table(), *(table.select(schema.names) for table in tables)]).select(
            wanted
        )


def _numbered(table: pa.Table, number: int) -> pa.Table:
    return table.append_column(_PART_FIELD, pa.array(np.full(table.num_rows, number, np.int32)))


def _grouped(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables in groups of some size: enough rows that looking up their keys costs little, few enough bytes."""
    group: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        group.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= _PIECE_ROWS or size >= _PIECE_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def table_parts(uri: str) -> list[str]:
    """URIs of the committed files of a stage table, sorted."""
    return [storage.join(uri, name) for name in storage.list_names(uri) if name.startswith("part-")]


def read_columns(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of one Parquet file; of a remote one, little else is fetched."""
    with storage.open_ranges(uri) as file:
        return pq.read_table(file, columns=columns)


def read_parts(uris: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of many Parquet files, in their order; a few ahead at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        for uri in uris:
            ahead.append(pool.submit(read_columns, uri, columns))
            if len(ahead) > _READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class StageWorker:
    """What runs in a Ray worker: computes a batch and commits it."""

    def __init__(self, stage: Stage, uri: str) -> None:
        self.stage = stage
        self.uri = uri
        self._function: RowFunction | None = None
        self.lock = threading.Lock()  # Ray may call from several threads

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Compute and commit; returns one row, a ``BatchReport``."""
        begin = time.perf_counter()
        inputs = batch.to_pylist()
        keys = [row[WORK_KEY] for row in inputs]
        with self.lock:
            if self._function is None:  # not in __init__: what an actor raises there reaches nobody as it was
                self._function = self.stage.function(self.uri)
            rows = self._function(inputs)
        table = pa.Table.from_pylist(rows, schema=self.stage.schema)
        covered = set(table[WORK_KEY].to_pylist())
        if covered != set(keys):
            raise RuntimeError(f"stage {self.stage.name} left out or made up keys: {sorted(covered ^ set(keys))[:3]}")
        name = "part-" + hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:24] + ".parquet"
        storage.write_bytes_atomic(storage.join(self.uri, name), parquet_bytes(table, row_group_rows=PART_ROW_GROUP))
        failures = pc.drop_null(table[ERROR]) if ERROR in table.column_names else pa.array([], pa.string())
        report = BatchReport(
            inputs=len(keys),
            outputs=len(rows),
            failed=len(failures),
            first_failure=failures[0].as_py() if len(failures) else "",
            busy_s=time.perf_counter() - begin,
            source_s=_source_seconds(table if "end_s" in table.column_names else batch),
            work=_sum(batch, WORK),
        )
        report.publish(self.stage.name)
        return pa.table({name: [value] for name, value in asdict(report).items()})


def _commit_stateless(batch: pa.Table, stage: Stage, uri: str) -> pa.Table:
    """As a StageWorker, in whichever Ray process is free."""
    return StageWorker(stage, uri)(batch)


def _sum(table: pa.Table, column: str) -> float:
    return float(pc.sum(table[column]).as_py() or 0.0) if column in table.column_names else 0.0


def _source_seconds(table: pa.Table) -> float:
    return _sum(table, "end_s") - _sum(table, "start_s")


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
    pending = anti_join(inputs, table.keys())
    before = inputs.num_rows - pending.num_rows
    state = StageProgress(total=inputs.num_rows, before=before, work_total=_sum(pending, WORK))
    failed_before = table.failures(inputs[WORK_KEY]) if math.isfinite(max_failed) else []
    if len(failed_before) > max_failed:
        raise TooManyFailuresError(failed_before[0], len(failed_before))
    if log is not None:
        log.update(stage.name, state, write=pending.num_rows > 0)
    if pending.num_rows:
        check_fits(stage)
        _record_settings(stage, table)
        with tqdm(total=state.total, initial=before, desc=stage.name, unit="row", disable=not progress) as bar:
            for report in _in_waves(stage, table, pending, state):
                bar.update(report.inputs)
                if log is not None:
                    log.update(stage.name, state)
                if report.failed and len(failed_before) + state.failed > max_failed:
                    raise TooManyFailuresError(report.first_failure, len(failed_before) + state.failed)
        if log is not None:
            log.update(stage.name, state)
    # Every report stands for committed rows; should their numbers not add up, the table itself is asked.
    if state.computed != pending.num_rows and (left := anti_join(inputs, table.keys()).num_rows):
        raise JobError(f"stage {stage.name}: {left} inputs stay pending though their workers reported success")
    return state.computed


def _in_waves(stage: Stage, table: StageTable, pending: pa.Table, state: StageProgress) -> Iterator[BatchReport]:
    """What is told of each part as it is committed; ``state`` is kept up to date with it."""
    begin = time.monotonic()
    for start in range(0, pending.num_rows, _WAVE_ROWS):
        for report in _execute(stage, table, pending.slice(start, _WAVE_ROWS)):
            _count(state, report, time.monotonic() - begin)
            yield report
        pa.default_memory_pool().release_unused()  # it would keep what the wave took


class TooManyFailuresError(Exception):
    """More inputs failed than the run bears.

    Attributes:
        reason: One of the failures.
        count: How many there are.
    """

    def __init__(self, reason: str, count: int) -> None:
        super().__init__(f"{count} inputs failed, such as: {reason}")
        self.reason = reason
        self.count = count


def _count(state: StageProgress, report: BatchReport, seconds: float) -> None:
    state.computed += report.inputs
    state.failed += report.failed
    state.busy_s += report.busy_s
    state.source_s += report.source_s
    state.work += report.work
    state.seconds = seconds


def anti_join(inputs: pa.Table, done: pa.Array) -> pa.Table:
    """The inputs whose key is not done."""
    return inputs.filter(pc.invert(pc.is_in(inputs[WORK_KEY], done))) if len(done) else inputs


def check_fits(stage: Stage) -> None:
    """Refuse what this machine can never hold; a cluster that was joined may grow.

    Raises:
        UserError: if a process of the stage wants more than there is.
    """
    wants = stage.resources
    needs = {"CPU": wants.num_cpus, "GPU": wants.num_gpus, "memory": 1e6 * (wants.memory_mb or 0.0)}
    lack = lacking([needs])
    if not lack:
        return
    if cluster_is_ours():
        raise UserError(
            f"stage {stage.name}: a process wants {lack}, which this machine does not have: lower it under resources, "
            "or set RAY_ADDRESS to a cluster that has it"
        )
    tqdm.write(f"stage {stage.name} waits for a node with {lack}", file=sys.stderr)


def _processes(resources: StageResources) -> int:
    """Processes that a stage may have: what it is allowed, else as many as the cluster can hold."""
    fitting = int(cluster_cores() / resources.num_cpus) if resources.num_cpus else cluster_cores()
    if resources.num_gpus:
        fitting = min(fitting, int(ray.cluster_resources().get("GPU", 0) / resources.num_gpus))
    return max(1, resources.max_workers or fitting)


def _record_settings(stage: Stage, table: StageTable) -> None:
    """For people: what the hash in the folder's name stands for."""
    uri = storage.join(table.uri, "stage.json")
    if not storage.exists(uri):
        storage.write_json_atomic(uri, {"stage": stage.name, "settings": stage.settings})


def _execute(stage: Stage, table: StageTable, pending: pa.Table) -> Iterator[BatchReport]:
    """Run one wave; yields what is told of each part as it is committed."""
    resources = stage.resources
    processes = _processes(resources)
    # Enough parts that workers end at about the same time, few enough that commits cost little.
    even = math.ceil(pending.num_rows / (4 * processes))
    size = min(stage.rows_per_part, max(stage.min_rows_per_part, even))
    starts = range(0, pending.num_rows, size)
    # `take` copies: a slice would drag the whole table along when it is pickled.
    blocks = [pending.take(pa.array(np.arange(s, min(s + size, pending.num_rows)))) for s in starts]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells the plan of every execution, and errors twice
    data: ray.data.Dataset = ray.data.from_arrow(blocks)
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": resources.num_cpus}
    if resources.num_gpus:
        options |= {"num_gpus": resources.num_gpus, "batch_size": size}  # Ray wants one named, then
    if resources.memory_mb:
        options["memory"] = resources.memory_mb * 1_000_000
    if stage.stateful:
        most = min(processes, len(blocks))
        pool = ray.data.ActorPoolStrategy(min_size=min(resources.min_workers, most), max_size=most)
        data = data.map_batches(StageWorker, fn_constructor_args=(stage, table.uri), compute=pool, **options)
    else:
        if resources.max_workers is not None:
            options["concurrency"] = min(resources.max_workers, len(blocks))
        data = data.map_batches(partial(_commit_stateless, stage=stage, uri=table.uri), **options)
    data.context.enable_progress_bars = False  # ours count rows, across waves
    data.context.raise_original_map_exception = True
    data.context.execution_no_progress_timeout_s = -1  # one batch may hold hours of film; decoding has its own bounds
    try:
        for row in data.iter_rows():
            yield BatchReport(**row)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        told = str(cause).partition("\nFailed to apply UDF")[0].strip()[-2000:]  # Ray adds advice about its settings
        if isinstance(cause, UserError):
            raise UserError(told) from error
        raise JobError(
            f"stage {stage.name} stopped: {type(cause).__name__}: {told}\n"
            "what was committed is kept; give the same command again to continue"
        ) from error
