"""What the benchmark of drawing counts and reports, on a small model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lumos.config import ModelConfig, SamplingConfig
from pipelines.benchmarks import clips
from pipelines.benchmarks.generate import (
    GenerateBenchmark,
    draw,
    memory_steps,
    new_decoder,
    run_generate_benchmark,
    sampling_flops,
)

SHAPE = (2, 8, 12)


def small_model() -> ModelConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    return ModelConfig(vocab_size=129536, visual_start=65536, head_dim=32, **sizes)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(clips.PRESETS, "cpu-156m", clips.Preset(small_model, SHAPE))


def config(**changes) -> GenerateBenchmark:
    return GenerateBenchmark(**{"batches": (1, 2), "repeats": 1, "sampling": SamplingConfig(num_steps=3), **changes})


@pytest.mark.parametrize("guidance", [1.0, 15.0])
def test_the_floor_is_what_the_counter_of_torch_sees_but_for_padding(guidance):
    sampling = SamplingConfig(num_steps=3, guidance_scale=guidance)
    model = new_decoder(config())
    with FlopCounterMode(display=False) as counter:
        draw(model, clips.PRESETS["cpu-156m"], sampling, 1, 0)
    floor = sampling_flops(small_model(), SHAPE, sampling)
    assert floor <= counter.get_total_flops() < 1.04 * floor


def test_the_report_has_every_batch(monkeypatch):
    monkeypatch.setattr("pipelines.benchmarks.generate.peak_rss_gb", lambda *_: 0.5)  # would build the whole model
    said: list[str] = []
    found = run_generate_benchmark(config(), said.append)
    assert list(found["batches"]) == ["1", "2"]
    assert found["video_s"] == found["batches"]["1"]["video_s"]
    assert found["products"] == pytest.approx(found["video_s"] / found["matmul2048_s"])
    assert found["peak_rss_gb"] == 0.5
    assert [line.split(":")[0] for line in said[:2]] == ["batch 1", "batch 2"]


def test_what_the_measured_process_does_draws_the_first_batch(monkeypatch):
    sizes = []
    monkeypatch.setattr("pipelines.benchmarks.generate.draw", lambda *arguments: sizes.append(arguments[3]))
    raw = vars(config(batches=(2,))) | {"sampling": vars(SamplingConfig(num_steps=3))}
    memory_steps(raw)
    assert sizes == [2]


def test_weights_are_of_the_dtype_asked_for():
    assert new_decoder(config(dtype="bfloat16")).lm_head.visual.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
