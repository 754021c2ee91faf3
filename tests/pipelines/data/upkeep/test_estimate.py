import pytest

from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.estimate import Cluster, plan_curation
from pipelines.errors import UserError
from tests.pipelines.data.corpora import FATES, GOOD, curate_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow  # a second curation; that of a sample stays
def test_a_plan_over_all_sources_tells_what_the_run_gives(curated, corpus, tokenizer_file, tmp_path):
    config = curate_config(corpus, tmp_path / "d", tokenizer_file)
    plan = plan_curation(config, Cluster(cpus=64, price=2.0), sources=1000)
    assert not (tmp_path / "d").exists()
    snapshot = open_snapshot(curated[1].snapshot_uri)
    totals = snapshot.manifest.totals.values()
    assert plan.sources == plan.sampled == GOOD + len(FATES)
    assert plan.clips == pytest.approx(sum(total.rows for total in totals))
    assert plan.tokens == pytest.approx(sum(total.tokens for total in totals))
    share, low, high = plan.kept_share
    assert share == pytest.approx((GOOD + 1) / (GOOD + 5))
    assert low < share < high
    assert [stage.name for stage in plan.stages] == ["sources", "split", "captions", "tokens"]
    # resources.workers=1 in this config: a larger cluster does not help.
    assert {stage.workers for stage in plan.stages} == {1}
    assert plan.hours == pytest.approx(sum(stage.work_s for stage in plan.stages) / 3600)
    assert plan.disk_gb > 0
    assert 0.02 < plan.process_gb < 16
    assert "7 clips" in str(plan)


@pytest.mark.slow
def test_a_sample_stands_for_all_by_bytes(corpus, tokenizer_file, tmp_path):
    config = curate_config(corpus, tmp_path / "d", tokenizer_file, "resources.workers=null")
    plan = plan_curation(config, Cluster(cpus=64), sources=4)
    assert plan.sampled == 4
    assert 0 < plan.clips < 4 * (GOOD + len(FATES))
    assert {stage.workers for stage in plan.stages} == {64}
    again = plan_curation(config, Cluster(cpus=64), sources=4)
    assert again.clips == plan.clips
    with pytest.raises(UserError, match="sources must be at least 1"):
        plan_curation(config, Cluster(cpus=64), sources=0)
    gpu = curate_config(corpus, tmp_path / "d", tokenizer_file, "resources.tokens={num_cpus: 1.0, num_gpus: 1.0}")
    with pytest.raises(
        UserError, match=r"no process of the stage tokens fits: under resources it wants 1 CPUs and 1 GPUs"
    ):
        plan_curation(gpu, Cluster(cpus=64), sources=1)
    with pytest.raises(UserError, match="cpus must be positive"):
        Cluster(cpus=0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tokens.tokenizer.path={}", "tokens.tokenizer: .*/nowhere"),
        ("source.path={}", "source.path .*/nowhere does not exist"),
    ],
)
def test_a_plan_tells_of_bad_input_as_the_run_does(corpus, tokenizer_file, tmp_path, override, told):
    config = curate_config(corpus, tmp_path / "d", tokenizer_file, override.format(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=told):
        plan_curation(config, Cluster(cpus=4), sources=1)
