"""A bulk run on real replicas, one of which is killed, into S3."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines import storage
from pipelines.errors import JobError
from pipelines.generation.bulk.check import check_layout
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import BatchConfig, GenerateConfig, ReplicaConfig, SamplingChoice
from tests.cluster import own_cluster

ENTRIES = [
    {"prompt_en": "a red square moves left", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a/b \U0001f600", "dimension": ["color"]},
]


def replicas() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [
        each for each in children if each.is_running() and "ServeReplica:lumos-generate" in " ".join(each.cmdline())
    ]


def files_of(uri: str) -> dict[str, bytes]:
    """Everything but the lock and what names the folder itself."""
    files = {found.path: storage.read_bytes(found.uri) for found in storage.list_files(uri)}
    return {path: data for path, data in files.items() if path not in ("generate.json", ".lock")}


@pytest.mark.slow
def test_a_run_ends_where_no_replica_starts_again_and_keeps_what_it_made(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    """Serve lets requests wait for ever then, and nobody was told."""
    model = shutil.copytree(generate_config.model, tmp_path / "model")
    config = replace(
        generate_config,
        model=str(model),
        prompts=tuple(f"a red square {number}" for number in range(9)),
        sampling=SamplingChoice(num_steps=100),
        batch=BatchConfig(max_size=1),
    )
    with own_cluster(num_cpus=2), ThreadPoolExecutor(1) as pool:
        run = pool.submit(generate, config)
        while not list(Path(config.output).glob("*.mp4")):
            assert not run.done()
            time.sleep(0.05)
        (model / "model.safetensors").unlink()
        for each in replicas():
            each.kill()
        with pytest.raises(JobError, match=r"does not start again \(.*not those .* began with.*same command continues"):
            run.result(timeout=240)
    rows = (Path(config.output) / "manifest.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 9


@pytest.mark.slow
def test_exactly_once_a_replica_killed_in_the_middle_costs_time_alone(
    generate_config: GenerateConfig, tmp_path: Path, s3_uri: str
) -> None:
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    config = replace(
        generate_config,
        prompts=str(tmp_path / "VBench_full_info.json"),
        layout="vbench",
        output=f"{s3_uri}/vbench",
        sampling=SamplingChoice(num_steps=100),
        batch=BatchConfig(max_size=2),
        replicas=ReplicaConfig(num_replicas=2, num_cpus=0.5, threads=1),
    )
    with own_cluster(num_cpus=3), ThreadPoolExecutor(1) as pool:
        run = pool.submit(generate, config)
        while not storage.list_names(f"{s3_uri}/vbench/videos"):
            assert not run.done()
            time.sleep(0.05)
        killed = replicas()
        assert len(killed) == 2
        killed[0].kill()
        assert run.result().generated == 30
        assert generate(replace(config, output=str(tmp_path / "undisturbed"))).generated == 30
    assert check_layout(config.output, "vbench").is_valid
    assert files_of(config.output) == files_of(str(tmp_path / "undisturbed"))
