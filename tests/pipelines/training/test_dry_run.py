"""One step of each bucket on a real cluster, and nothing left behind."""

from click.testing import CliRunner

from jobs.train import command
from pipelines.config import config_to_yaml
from pipelines.training.config import EmaConfig, ResourceConfig
from pipelines.training.dry_run import first_steps
from pipelines.training.prepare import prepare
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot

BUCKETS = {(2, 4, 4): 21, (3, 4, 6): 8}


def test_the_largest_bucket_is_tried_first_and_each_once(tmp_path):
    run = prepare(tiny_config(write_snapshot(tmp_path / "dataset", BUCKETS), tmp_path / "out"))
    steps = first_steps(run)
    assert len(steps) == 2
    plan = run.plan()
    assert [plan.step(step).bucket.shape for step in steps] == [(3, 4, 6), (2, 4, 4)]
    for step in steps:
        shape = plan.step(step).bucket.shape
        assert all(plan.step(before).bucket.shape != shape for before in range(step))


def test_a_dry_run_tells_of_each_bucket_and_leaves_nothing(ray_cluster, tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", BUCKETS)
    # 8 workers have no room on the 6 CPUs of the cluster: training would begin with fewer.
    scale = {"num_workers": 8, "min_workers": 2, "resources": ResourceConfig(cpus_per_worker=1.0)}
    config = tiny_config(dataset, tmp_path / "runs" / "out", ema=EmaConfig(start=50), **scale)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(command, [str(file), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = done.output.splitlines()
    assert told[0].startswith("3x4x6: ")
    assert told[1].startswith("2x4x4: ")
    assert all(" tokens, loss " in line and " GB of a process" in line for line in told[:2])
    assert told[2].startswith("tried with the 2 workers of min_workers")
    assert "no validation" in told[3]
    assert sorted(tmp_path.rglob("*")) == before
