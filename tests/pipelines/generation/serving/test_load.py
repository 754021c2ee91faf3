"""Many clients at once, each answer held against what was asked; a minute of it is `lumos benchmark load`."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.benchmarks.load import LoadConfig, run_load
from pipelines.generation.config import BatchConfig, ServeConfig
from tests.pipelines.generation.serving.in_process import listening


@pytest.mark.parametrize("jobs", [False, True])
def test_under_load_every_request_is_answered_by_its_video_or_a_refusal(
    serve_config: ServeConfig, tmp_path: Path, jobs: bool
) -> None:
    config = replace(serve_config, jobs=str(tmp_path), batch=BatchConfig(max_size=4, max_queued=8), max_jobs=8)
    with listening(config) as url:
        found = run_load(LoadConfig(url=url, clients=24, duration_s=2.0, jobs=jobs, request={"steps": 2}))
    assert found["wrong"] == []
    assert found["videos"] > 0
    assert found["answers"].keys() <= {"200", "503", "accepted"}
    assert found["answers"]["503"] > 0  # the queue is bounded
