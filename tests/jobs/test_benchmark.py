"""The benchmarks of training run, on one frame of small clips, and check themselves against dense forms."""

import json

import pytest
import torch
from click.testing import CliRunner

from jobs.benchmark import command
from lumos.config import ModelConfig
from pipelines.benchmarks import clips, layers, train
from pipelines.errors import UserError


def small_model() -> ModelConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    return ModelConfig(vocab_size=129536, visual_start=65536, head_dim=32, **sizes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(clips.PRESETS, "cpu-156m", clips.Preset(small_model, (1, 4, 4)))
    monkeypatch.setattr(layers, "_SHAPES", ((2, 4, 4),))
    monkeypatch.setattr(train, "_MEMORY_RUNS", {})  # its processes would build the whole model


@pytest.mark.parametrize("name", ["train", "attention", "loss"])
def test_a_benchmark_checks_itself_and_writes_its_samples(name, tmp_path):
    file = tmp_path / "found.json"
    result = CliRunner().invoke(command, [name, "--repeats", "2", "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["machine"]["cores"] >= 1
    samples = {
        "train": lambda: found["raw"]["fp32_s"],
        "attention": lambda: found["2x4x4"]["ours_s"],
        "loss": lambda: found["fp32"]["ours_s"],
    }
    assert len(samples[name]()) == 2


def test_the_product_that_others_are_told_in_is_float32(monkeypatch):
    products = []

    def timed(work):
        result = work()
        products.extend([result.dtype] if isinstance(result, torch.Tensor) else [])
        return 1.0

    monkeypatch.setattr(layers, "timed", timed)
    layers.run_loss_benchmark("cpu-156m", 1, str, device="cpu")
    assert products == [torch.float32] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rows", "2", "--compile"], "--rows, --compile: only with --device cuda"),
        (["attention", "--backend", "fused_flash"], "--backend fused_flash is not for --device cpu"),
        *(([name, "--device", "cuda"], "torch finds no CUDA device") for name in ("train", "attention", "loss")),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_what_cannot_be_measured_here_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_wrong_gradient_is_found_out(monkeypatch):
    right = train.step

    def wrong(module, batch):
        loss = right(module, batch)
        module.decoder.model.norm.weight.grad += 1.0
        return loss

    monkeypatch.setattr(train, "step", wrong)
    with pytest.raises(RuntimeError, match="off the dense reference"):
        train.check_against_dense({"fp32": clips.new_module(small_model())}, clips.whole_clips((1, 4, 4)))
