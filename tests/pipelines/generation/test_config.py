from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from lumos.config import SamplingConfig, ShortcutConfig
from pipelines.config import load_config, shipped_configs
from pipelines.errors import UserError
from pipelines.generation.config import GenerateConfig, ReplicaConfig, SamplingChoice, ServeConfig


@pytest.mark.parametrize("name", shipped_configs("generate"))
def test_shipped_bulk_configs_are_complete(name: str) -> None:
    config = load_config(GenerateConfig, name, ["model=export", "prompts=prompts.txt"])
    assert config.model == "export"


@pytest.mark.parametrize("name", shipped_configs("serve"))
def test_shipped_service_configs_are_complete(name: str) -> None:
    assert load_config(ServeConfig, name, ["model=export"]).host == "127.0.0.1"


def test_prompts_are_a_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: o\nprompts: prompts.csv\n")
    assert load_config(GenerateConfig, str(file)).prompts == "prompts.csv"
    overridden = load_config(GenerateConfig, str(file), ['prompts=["one", "two, with a comma"]'])
    assert overridden.prompts == ("one", "two, with a comma")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.num_steps=0", "num_steps must be at least 1, got 0"),
        ("sampling.steps=3", "did you mean"),
        ("video.width=-8", "width must be positive, got -8"),
        ("seeds_per_prompt=0", "seeds_per_prompt must be at least 1"),
        ("seed=-1", "seed must be in"),
        ("format=avi", "format"),
        ("replicas.device=cuda", "num_gpus is 0"),
        ("batch.max_queued=2", "at least max_size"),
        ("model=''", "model is empty"),
        ("prompts=3", "prompts"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: o\nprompts: prompts.csv\n")
    with pytest.raises(UserError, match=message):
        load_config(GenerateConfig, str(file), [override])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 0}, "port"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"body_timeout_s": 0.0}, "body_timeout_s"),
        ({"max_open_bodies": 0}, "max_open_bodies"),
        ({"token": " "}, "token"),
        ({"max_steps": 0}, "max_steps"),
        ({"jobs": " "}, "jobs is empty"),
        ({"token": ", "}, "token is empty"),
        ({"max_replicas": 0}, r"max_replicas \(0\) must be at least replicas.num_replicas \(1\)"),
        ({"rate_per_minute": 0}, "rate_per_minute must be at least 1"),
        ({"models": {"a": ""}}, "models: 'a' names no folder"),
    ],
)
def test_wrong_service_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ServeConfig(model="m"), **changes)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert ServeConfig(model="m", host=host).is_loopback is loopback


def test_the_device_follows_the_reserved_gpus() -> None:
    assert ReplicaConfig().torch_device == "cpu"
    assert ReplicaConfig(num_gpus=0.5).torch_device == "cuda"
    assert ReplicaConfig(num_gpus=1, device="cpu").torch_device == "cpu"


def test_a_run_may_choose_every_setting_of_the_sampler() -> None:
    assert [f.name for f in fields(SamplingChoice)] == [f.name for f in fields(SamplingConfig)]
    recommended = SamplingConfig(num_steps=12, guidance_scale=2.0, history_ratio=0.3, temperature=0.5)
    assert SamplingChoice().over(recommended) == recommended
    assert SamplingChoice(guidance_scale=0.0).over(recommended) == replace(recommended, guidance_scale=0.0)
    listed = replace(recommended, shortcuts=ShortcutConfig(order="halton", frame_steps=(8, 2)))
    assert SamplingChoice(guidance_scale=0.0).over(listed).steps_of(1) == 2
    chosen = SamplingChoice(num_steps=5).over(listed)  # which a recommended list would make nothing of
    assert (chosen.steps_of(0), chosen.steps_of(1)) == (5, 5)
    assert chosen.shortcuts == ShortcutConfig(order="halton")
    everything = replace(recommended, release_temperature=True, release_given_frames=True)
    assert SamplingChoice(**asdict(everything)).over(SamplingConfig()) == everything
