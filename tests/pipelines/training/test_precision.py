import json
from dataclasses import replace

import pytest
import torch

from pipelines.training.config import ResourceConfig
from pipelines.training.output import Output
from pipelines.training.precision import has_bf16_products, slow_precision, with_precision
from pipelines.training.prepare import prepare
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot


def test_avx2_alone_does_not_multiply_in_bf16():
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        assert not has_bf16_products()


def test_auto_takes_what_the_device_has(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "out", precision="auto")
    assert with_precision(config).precision == ("bf16" if has_bf16_products() else "fp32")
    assert with_precision(replace(config, resources=ResourceConfig(device="gpu"))).precision == "bf16"
    for given in ("bf16", "fp32"):
        assert with_precision(replace(config, precision=given)).precision == given


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
def test_a_run_keeps_what_it_began_in(tmp_path, begun):
    """The same command goes on with it on a machine that has other products."""
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 21})
    first = prepare(tiny_config(dataset, tmp_path / "out", precision=begun))
    Output(first.config, snapshot_digest=first.dataset_digest).begin(first.config)
    again = prepare(replace(first.config, precision="auto"))
    assert again.config == first.config
    Output(again.config, snapshot_digest=again.dataset_digest)  # takes it for the same run
    assert again.info.train_config["precision"] == begun


def test_a_run_file_that_says_nothing_of_it_is_no_obstacle(tmp_path):
    config = tiny_config(tmp_path, tmp_path, precision="auto")
    for content in ("{", "[]", json.dumps({"identity": {"precision": "int4"}})):
        (tmp_path / "run.json").write_text(content)
        assert with_precision(config).precision in ("bf16", "fp32")


def test_slow_products_are_told(tmp_path):
    told = slow_precision(tiny_config(tmp_path, tmp_path, precision="bf16"))
    assert (told is None) == has_bf16_products()
    assert told is None or "precision=auto" in told
    assert slow_precision(tiny_config(tmp_path, tmp_path, precision="fp32")) is None
