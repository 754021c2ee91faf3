"""The benchmark of a curation runs, and what it measures is a curation."""

import pytest

from pipelines.benchmarks.curation import measure_curation
from pipelines.data.snapshot.read import open_snapshot
from pipelines.data.upkeep.verify import verify_snapshot


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_curation_of_clips_that_are_made_up(tmp_path):
    said = []
    found = measure_curation(tmp_path, 300, said.append)
    assert found["all"]["kept"] == found["nothing"]["kept"]
    assert 240 < found["all"]["kept"] < 300  # one of ten shows no motion
    assert len(said) == 3
    assert found["all"]["worker_peak_mb"] > 50
    snapshot = open_snapshot(str(tmp_path / "curated"))
    assert snapshot.manifest.ledger.rows == 300
    assert snapshot.manifest.ledger.counts["kept"] == found["all"]["kept"]
    assert verify_snapshot(snapshot).problems == ()
