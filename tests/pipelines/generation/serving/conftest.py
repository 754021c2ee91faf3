"""Places for jobs, a folder and a bucket of a real S3 server, and services that keep theirs there."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.generation.config import BatchConfig, ServeConfig
from pipelines.generation.serving import runner


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    bucket: str = request.getfixturevalue("s3_uri")
    return f"{bucket}/{tmp_path.name}"


@pytest.fixture
def config(serve_config: ServeConfig, tmp_path: Path) -> ServeConfig:
    return replace(serve_config, jobs=str(tmp_path / "jobs"), batch=BatchConfig(max_size=4, max_queued=64))


@pytest.fixture
def anywhere(config: ServeConfig, uri: str) -> ServeConfig:
    """Jobs in a folder, and in S3."""
    return replace(config, jobs=uri)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LOOK_S", 0.05)
    monkeypatch.setattr(runner, "_SIGN_S", 0.1)
