import os
import signal
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipelines.data.stage import run as run_module
from pipelines.data.stage.run import StageWorker, _part_bounds, run_stage
from pipelines.data.stage.stage import Stage, StageResources
from pipelines.data.stage.table import PART, StageTable, anti_join
from pipelines.errors import JobError, UserError

SCHEMA = pa.schema([("work_key", pa.string()), ("value", pa.int64())])


class Double:
    """The function of most tests: twice the value, for each of ``copies``."""

    def __init__(self, uri, *, copies=1, fail_on=None, die_on=None, error=RuntimeError):
        self.uri, self.copies, self.fail_on, self.die_on, self.error = uri, copies, fail_on, die_on, error

    def __call__(self, rows):
        for row in rows:
            if row["value"] == self.fail_on:
                raise self.error(f"cannot take {row['value']}")
            flag = Path(self.uri) / "died"
            if row["value"] == self.die_on and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [
            {"work_key": row["work_key"], "value": 2 * row["value"] + copy}
            for row in rows
            for copy in range(self.copies)
        ]


def stage(*, rows_per_part=7, stateful=False, settings=None, **options):
    return Stage(
        name="double",
        settings=settings or {},
        schema=SCHEMA,
        function=partial(Double, **options),
        rows_per_part=rows_per_part,
        resources=StageResources(max_workers=2),
        stateful=stateful,
    )


def inputs(values):
    return pa.table({"work_key": [f"k{value:05d}" for value in values], "value": pa.array(values, pa.int64())})


def run(stage, table, dataset):
    return run_stage(stage, table, dataset=str(dataset))


def values(stage, dataset):
    return sorted(StageTable(str(dataset), stage).read()["value"].to_pylist())


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stateful", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_input_is_computed_once_though_a_worker_is_killed_and_never_again(tmp_path, stateful):
    double = stage(die_on=20, stateful=stateful)
    Path(StageTable(str(tmp_path), double).uri).mkdir(parents=True)
    assert run(double, inputs(range(50)), tmp_path) == 50
    assert (Path(StageTable(str(tmp_path), double).uri) / "died").exists()
    assert values(double, tmp_path) == [2 * value for value in range(50)]
    assert run(double, inputs(range(50)), tmp_path) == 0
    assert run(double, inputs(range(40, 60)), tmp_path) == 10
    assert values(double, tmp_path) == [2 * value for value in range(60)]


class Loaded(Double):
    """One that leaves a file when it is made."""

    def __init__(self, uri, **options):
        super().__init__(uri, **options)
        (Path(uri) / f"made-{time.monotonic_ns()}").touch()


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_are_worth_keeping_begin_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_FIRST_PARTS", 2)
    alone = StageResources(max_workers=1)
    double = replace(stage(stateful=True, rows_per_part=1), function=partial(Loaded), resources=alone)
    Path(StageTable(str(tmp_path), double).uri).mkdir(parents=True)
    assert run(double, inputs(range(8)), tmp_path) == 8
    assert len(list(Path(StageTable(str(tmp_path), double).uri).glob("made-*"))) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_fan_out_keeps_all_rows_of_a_key(tmp_path):
    double = stage(copies=3)
    assert run(double, inputs(range(10)), tmp_path) == 10
    assert values(double, tmp_path) == sorted(2 * value + copy for value in range(10) for copy in range(3))


@pytest.mark.usefixtures("ray_cluster")
def test_another_configuration_is_another_table(tmp_path):
    run(stage(settings={"a": 1}), inputs(range(5)), tmp_path)
    assert run(stage(settings={"a": 2}), inputs(range(5)), tmp_path) == 5
    assert run(stage(settings={"a": 1}), inputs(range(5)), tmp_path) == 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_run_keeps_what_was_committed_and_names_the_cause(tmp_path):
    with pytest.raises(JobError, match=r"stage double stopped: .*cannot take 30"):
        run(stage(fail_on=30, rows_per_part=1), inputs(range(31)), tmp_path)
    before = len(values(stage(), tmp_path))
    assert run(stage(), inputs(range(31)), tmp_path) == 31 - before
    assert values(stage(), tmp_path) == [2 * value for value in range(31)]


@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_found_by_a_worker_stays_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot take 3"):
        run(stage(fail_on=3, error=UserError), inputs(range(5)), tmp_path)


def test_parts_are_named_by_their_keys_and_overwritten_not_doubled(tmp_path):
    double = stage()
    table = StageTable(str(tmp_path), double)
    worker = StageWorker(double, table.uri)
    worker(inputs(range(5)))
    first = {Path(part).name: Path(part).read_bytes() for part in table.parts()}
    worker(inputs([4, 3, 2, 1, 0]))
    assert {Path(part).name for part in table.parts()} == set(first)
    assert pq.read_table(table.parts()[0]).num_rows == 5


def test_a_key_that_two_runs_committed_is_read_once(tmp_path):
    double = stage(copies=2)
    table = StageTable(str(tmp_path), double)
    worker = StageWorker(double, table.uri)
    worker(inputs(range(5)))
    worker(inputs(range(3, 9)))  # a straggler of an earlier run, with keys of its own besides
    assert len(table.parts()) == 2
    assert values(double, tmp_path) == sorted(2 * value + copy for value in range(9) for copy in range(2))
    assert sorted(table.keys().to_pylist()) == [f"k{value:05d}" for value in range(9)]


def test_parts_are_numbered_as_they_were_listed(tmp_path):
    double = stage()
    table = StageTable(str(tmp_path), double)
    StageWorker(double, table.uri)(inputs(range(5)))
    parts = table.parts()
    for value in range(5, 25):  # some of which come before it
        StageWorker(double, table.uri)(inputs([value]))
    assert table.parts().index(parts[0]) > 0
    assert table.read([PART], inputs(range(5))["work_key"], parts=parts)[PART].to_pylist() == [0] * 5


def test_a_half_written_part_is_not_read(tmp_path):
    double = stage()
    table = StageTable(str(tmp_path), double)
    StageWorker(double, table.uri)(inputs(range(5)))
    (Path(table.uri) / ".part-x.parquet.123.tmp").write_bytes(b"PAR1")
    assert values(double, tmp_path) == [0, 2, 4, 6, 8]


def test_a_function_must_answer_for_each_key(tmp_path):
    with pytest.raises(RuntimeError, match="left out or made up keys"):
        StageWorker(stage(copies=0), str(tmp_path))(inputs(range(2)))


def test_anti_join(tmp_path):
    assert anti_join(inputs(range(5)), pa.array(["k00001", "k00003", "other"]))["value"].to_pylist() == [0, 2, 4]
    assert anti_join(inputs(range(5)), pa.array([], pa.string())).num_rows == 5


@pytest.mark.usefixtures("ray_cluster")
def test_the_runner_itself_costs_little(tmp_path):
    null = stage(rows_per_part=4096)
    run(null, inputs(range(10)), tmp_path)  # workers are up
    rows = 60_000
    begin = time.perf_counter()
    run(null, inputs(range(10, 10 + rows)), tmp_path)
    per_row = (time.perf_counter() - begin) / rows
    assert per_row < 1e-3  # 0.2 ms when the machine has nothing else to do; the benchmark measures it


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (StageResources(num_gpus=1.0), r"1 GPU \(there is 0\)"),
        (StageResources(num_cpus=99.0), r"99 CPU \(there is 6"),
        (StageResources(memory_mb=1e9), r"1e\+15 memory"),
    ],
)
def test_a_stage_that_can_never_run_here_is_told_at_once(tmp_path, resources, told):
    with pytest.raises(UserError, match=f"stage double: a process wants {told}"):
        run(replace(stage(), resources=resources), inputs(range(3)), tmp_path)


@pytest.mark.parametrize(
    ("clips", "size", "bounds"),
    [
        ([1, 1, 1, 1, 1], 2, [0, 2, 4, 5]),
        ([3, 3, 3], 2, [0, 3, 6, 9]),  # a file ends its part
        ([2, 5, 1, 7, 1], 3, [0, 7, 15, 16]),
        ([6, 6], 7, [0, 6, 12]),  # no part has more than 10 rows
        ([25, 2], 3, [0, 10, 20, 25, 27]),  # nor has one of a long file
    ],
)
def test_rows_of_a_remote_file_share_a_part(clips, size, bounds):
    uris = [f"s3://bucket/{number}" for number, count in enumerate(clips) for _ in range(count)]
    remote = pa.table({"uri": uris})
    together = replace(stage(rows_per_part=10), file_column="uri")
    assert _part_bounds(together, remote, size) == bounds
    even = [*range(0, sum(clips), size), sum(clips)]
    assert _part_bounds(stage(rows_per_part=10), remote, size) == even
    local = pa.table({"uri": [uri.removeprefix("s3:/") for uri in uris]})
    assert _part_bounds(together, local, size) == even
    assert all(last > first for first, last in pairwise(bounds))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stateful", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_are_as_large_however_many_a_worker_is_handed_at_a_time(tmp_path, monkeypatch, stateful):
    monkeypatch.setattr(run_module, "_FIRST_PARTS", 4)
    monkeypatch.setattr(run_module, "_FIRST_ROWS", 28)
    monkeypatch.setattr(run_module, "_WAVE_PARTS", 1)
    for seconds in (0.0, 60.0):
        monkeypatch.setattr(run_module, "_BLOCK_SECONDS", seconds)
        assert run(stage(stateful=stateful, die_on=150), inputs(range(300)), tmp_path / str(seconds)) == 300
    names = [sorted(path.name for path in (tmp_path / name).rglob("part-*.parquet")) for name in ("0.0", "60.0")]
    assert names[0] == names[1]
    assert len(names[0]) == 46  # 28 rows first, in parts of 4, then 272 in parts of 7


@pytest.mark.slow  # a cluster of its own
def test_the_only_gpu_is_for_the_worker_that_computes(no_cluster, tmp_path):
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        wants = replace(stage(stateful=True), resources=StageResources(num_gpus=1.0, memory_mb=100))
        assert run_stage(wants, inputs(range(20)), dataset=str(tmp_path)) == 20
    finally:
        ray.shutdown()
