"""What a run tells of itself while it goes on: its file, the failure budget, and metrics for Prometheus."""

import subprocess
import time
import urllib.request
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pytest
import ray

from pipelines.data.stage.log import RunLog, StageProgress, last_run
from pipelines.data.stage.run import TooManyFailuresError, run_stage
from pipelines.data.stage.stage import Stage, StageResources

SCHEMA = pa.schema(
    [("work_key", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64()), ("error", pa.string())]
)


class Fail:
    """Ten seconds of video for each input; some fail."""

    def __init__(self, uri, *, every):
        self.every = every

    def __call__(self, rows):
        return [
            {"work_key": row["work_key"], "error": "broken (permanent): no good"}
            if row["number"] % self.every == 0
            else {"work_key": row["work_key"], "start_s": 0.0, "end_s": 10.0}
            for row in rows
        ]


def stage(every):
    return Stage(
        name="fail",
        settings={"every": every},
        schema=SCHEMA,
        function=partial(Fail, every=every),
        rows_per_part=5,
        resources=StageResources(max_workers=1),
        stateful=False,
    )


def inputs(count):
    columns = {"work_key": [f"k{number}" for number in range(count)], "number": range(count), "work": [2.0] * count}
    return pa.table(
        columns, schema=pa.schema([("work_key", pa.string()), ("number", pa.int64()), ("work", pa.float64())])
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_leaves_a_file_that_tells_how_far_each_stage_is(tmp_path):
    assert last_run(str(tmp_path)) is None
    with RunLog(str(tmp_path)).record() as log:
        run_stage(stage(10), inputs(20), dataset=str(tmp_path), log=log)
    with RunLog(str(tmp_path)).record() as log:
        run_stage(stage(10), inputs(40), dataset=str(tmp_path), log=log)
    found = last_run(str(tmp_path))
    assert found.state == "done"
    progress = found.stages["fail"]
    assert (progress.total, progress.before, progress.computed, progress.failed, progress.pending) == (40, 20, 20, 2, 0)
    assert (progress.source_s, progress.work, progress.work_total) == (180.0, 40.0, 40.0)
    assert progress.seconds >= progress.busy_s > 0
    assert "fail       40 of 40 done, 2 failed" in str(found)
    assert "s of video a second" in str(found)
    with pytest.raises(KeyError), RunLog(str(tmp_path)).record():
        raise KeyError
    assert last_run(str(tmp_path)).state == "stopped"


def test_a_run_that_was_killed_is_not_called_running(tmp_path):
    log = RunLog(str(tmp_path))
    log.write("running")
    assert "last run: running" in str(last_run(str(tmp_path)))
    ended = subprocess.Popen(["true"])
    ended.wait()
    record = last_run(str(tmp_path))
    assert "last run: ended without a word" in str(replace(record, pid=ended.pid))
    assert "last run: running" in str(replace(record, pid=ended.pid, host="elsewhere"))


def test_the_time_left_goes_by_work_where_inputs_name_it():
    progress = StageProgress(total=100, before=20, computed=40, seconds=60.0)
    assert progress.seconds_left == pytest.approx(60.0)
    progress = StageProgress(total=100, before=20, computed=40, seconds=60.0, work=10.0, work_total=40.0)
    assert progress.seconds_left == pytest.approx(180.0)
    assert str(progress) == "60 of 100 done, 0.667 a second, 0:03:00 left"
    assert StageProgress(total=10, before=0).seconds_left is None
    long = StageProgress(total=100, before=0, computed=1, seconds=1000.0)
    assert str(long) == "1 of 100 done, 0.001 a second, 1 day 3:30:00 left"


@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_stops_as_soon_as_too_many_inputs_failed(tmp_path):
    with pytest.raises(TooManyFailuresError, match="such as: broken"):
        run_stage(stage(2), inputs(1000), dataset=str(tmp_path), max_failed=10)
    time.sleep(2.0)  # a batch that was being computed may still be committed
    parts = set(tmp_path.glob("stages/fail/*/part-*"))
    assert 4 <= len(parts) < 150  # of 200: it did not go on to the end
    # What failed before counts too, and what was done stays done.
    with pytest.raises(TooManyFailuresError):
        run_stage(stage(2), inputs(1000), dataset=str(tmp_path), max_failed=10)
    assert set(tmp_path.glob("stages/fail/*/part-*")) == parts  # not one more
    with pytest.raises(TooManyFailuresError):  # also where nothing is pending
        run_stage(stage(2), inputs(10), dataset=str(tmp_path), max_failed=3)
    assert run_stage(stage(2), inputs(10), dataset=str(tmp_path), max_failed=10) <= 10


@pytest.mark.usefixtures("ray_cluster")
def test_progress_can_be_read_by_prometheus(tmp_path):
    run_stage(stage(10), inputs(20), dataset=str(tmp_path))
    port = ray.nodes()[0]["MetricsExportPort"]
    for _ in range(60):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        if "ray_lumos_data_inputs" in text and 'stage="fail"' in text:
            break
        time.sleep(0.5)
    told = [line for line in text.splitlines() if line.startswith("ray_lumos_data_")]
    assert any(line.startswith("ray_lumos_data_failed") and 'stage="fail"' in line for line in told), told
    assert any(line.startswith("ray_lumos_data_source_s") for line in told)
