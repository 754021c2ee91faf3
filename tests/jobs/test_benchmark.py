"""The benchmarks of training run, on one frame of small clips, and check themselves against dense forms."""

import json

import pytest
from click.testing import CliRunner

from jobs.benchmark import command
from lumos.config import ModelConfig
from pipelines.benchmarks import clips, layers, train


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


def test_a_wrong_gradient_is_found_out(monkeypatch):
    right = train.step

    def wrong(module, batch):
        loss = right(module, batch)
        module.decoder.model.norm.weight.grad += 1.0
        return loss

    monkeypatch.setattr(train, "step", wrong)
    with pytest.raises(RuntimeError, match="off the dense reference"):
        train.check_against_dense({"fp32": clips.new_module(small_model())}, clips.whole_clips((1, 4, 4)))
