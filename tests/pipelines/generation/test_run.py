"""What a bulk run and the service find wrong before Ray is started. Real runs: test_serving.py."""

import json
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from lumos.config import SamplingConfig
from lumos.encoder import RequestEncoder
from lumos.tokenizers import TextTokenizer
from pipelines.errors import UserError
from pipelines.generation.bulk.plan import plan
from pipelines.generation.bulk.run import generate
from pipelines.generation.config import GenerateConfig, SamplingChoice, ServeConfig, SizeConfig, TokenizerSource
from pipelines.generation.model import read_card
from pipelines.generation.serving.run import _announce, check_port, serve
from tests.pipelines.generation.conftest import free_port, save_tokenizer


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", started)


def copy_model(model_dir: Path, target: Path, **changes: Any) -> Path:
    """The model with other values in its config: top-level keys, or ``info``."""
    shutil.copytree(model_dir, target)
    config = json.loads((target / "config.json").read_text())
    config["lumos"]["info"].update(changes.pop("info", {}))
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "nowhere is not a checkpoint"),
        ({"prompts": "none.txt"}, "there is no file none.txt"),
        ({"prompts": ()}, "empty list"),
        ({"prompts": ("fine", "word " * 1000)}, "item 1 .*use a shorter prompt"),
        ({"video": SizeConfig(width=40)}, "width 40 is not a multiple of 16 px.*use 32 or 48"),
        ({"video": SizeConfig(num_frames=10)}, "num_frames 10 is not 1 \\+ 4k: use 9 or 13"),
        ({"video": SizeConfig(fps=500.0)}, "fps 500 is outside 1..64"),
        ({"video": SizeConfig(num_frames=1 + 4 * 100, fps=1.0)}, "longer than 64 s"),
        ({"video": SizeConfig(width=512, height=512)}, "^video: 512x512, .* alone make .* takes 600: use fewer frames"),
        ({"format": "png"}, "png holds one frame, num_frames is 9"),
        ({"output": "one.mp4"}, "one.mp4 is one file, for 2 videos"),
        ({"output": "one.gif", "prompts": ("one",)}, "does not end in .mp4"),
        ({"text_tokenizer": "none.json"}, "text_tokenizer"),
        ({"tokenizer": TokenizerSource(path="none.safetensors")}, "none.safetensors"),
        ({"tokenizer": TokenizerSource(kind="cosmos")}, "cosmos needs a path"),
    ],
)
def test_mistakes_are_found_before_ray_starts(
    generate_config: GenerateConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(replace(generate_config, **changes))
    assert not Path(generate_config.output).exists()


def test_an_output_that_cannot_be_a_folder_is_found_before_ray_starts(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: cannot write"):
        generate(replace(generate_config, output=str(tmp_path / "file")))


def test_another_video_tokenizer_than_the_model_was_trained_with_is_refused_naming_both(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    other = save_tokenizer(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError) as error:
        generate(replace(generate_config, tokenizer=TokenizerSource(path=str(other))))
    assert str(other) in str(error.value)
    assert generate_config.model in str(error.value)
    assert str(error.value).count("sha256:") == 2


def test_a_text_tokenizer_with_more_ids_than_the_model_is_refused(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    large = TextTokenizer.train(["many different words for a large vocabulary"] * 3, vocab_size=400)
    large.save(tmp_path / "large.json")
    with pytest.raises(UserError, match="room for"):
        generate(replace(generate_config, text_tokenizer=str(tmp_path / "large.json")))


def test_another_text_tokenizer_than_the_model_was_trained_with_is_refused(
    generate_config: GenerateConfig, tmp_path: Path
) -> None:
    other = TextTokenizer.train(["other words"], vocab_size=260)
    other.save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"text_tokenizer: .*other.json .*is not the one the model .* was trained with"):
        generate(replace(generate_config, text_tokenizer=str(tmp_path / "other.json")))


def test_a_checkpoint_that_names_no_size_asks_for_one(
    generate_config: GenerateConfig, model_dir: Path, tmp_path: Path
) -> None:
    model = copy_model(model_dir, tmp_path / "model", info={"shapes": None})
    config = replace(generate_config, model=str(model))
    with pytest.raises(UserError, match="width is not given"):
        generate(config)
    size = RequestEncoder(read_card(config).folder).size(width=32, height=16, num_frames=1, fps=12.0)
    assert (size.width, size.height, size.latent_shape) == (32, 16, (1, 2, 4))


RECOMMENDED = {"num_steps": 3, "guidance_scale": 2.0, "history_ratio": 0.4, "temperature": 0.5}


def test_what_is_left_out_is_drawn_as_the_model_recommends(
    generate_config: GenerateConfig, model_dir: Path, tmp_path: Path
) -> None:
    model = copy_model(model_dir, tmp_path / "model", info={"sampling": RECOMMENDED})
    config = replace(generate_config, model=str(model), sampling=SamplingChoice())
    card = read_card(config)
    assert card.sampling == SamplingConfig(**RECOMMENDED)
    assert {job.request.sampling for job in plan(config, card)} == {card.sampling}
    chosen = replace(config, sampling=SamplingChoice(num_steps=5, guidance_scale=1.0))
    assert read_card(chosen).sampling == SamplingConfig(**{**RECOMMENDED, "num_steps": 5, "guidance_scale": 1.0})
    assert read_card(chosen).identity == card.identity


def test_a_model_that_recommends_nothing_is_drawn_as_the_release(
    generate_config: GenerateConfig, model_dir: Path, tmp_path: Path
) -> None:
    config = replace(generate_config, sampling=SamplingChoice())
    silent = copy_model(model_dir, tmp_path / "silent", info={"sampling": None})
    assert read_card(replace(config, model=str(silent))).sampling == SamplingConfig()
    older = copy_model(model_dir, tmp_path / "older")
    raw = json.loads((older / "config.json").read_text())
    raw["lumos"] |= {"format_version": 1, "extra": raw["lumos"].pop("info")}
    del raw["lumos"]["extra"]["sampling"]
    (older / "config.json").write_text(json.dumps(raw))
    card = read_card(replace(config, model=str(older)))
    assert (card.sampling.num_steps, card.sampling.guidance_scale) == (50, 15.0)


def test_a_service_that_allows_fewer_steps_than_its_default_is_refused(
    serve_config: ServeConfig, model_dir: Path, tmp_path: Path
) -> None:
    model = copy_model(model_dir, tmp_path / "model", info={"sampling": {"num_steps": 9}})
    config = replace(serve_config, port=free_port(), model=str(model), sampling=SamplingChoice(), max_steps=8)
    with pytest.raises(UserError, match="max_steps: 8 is less than the 9 steps"):
        serve(config)


def test_weights_of_another_shape_or_damaged_are_found_before_ray_starts(
    generate_config: GenerateConfig, model_dir: Path, tmp_path: Path
) -> None:
    model = copy_model(model_dir, tmp_path / "wide", intermediate_size=96)
    with pytest.raises(UserError, match=r"weights in .*wide do not fit .*shape \[128, 64\], the model \[96, 64\]"):
        generate(replace(generate_config, model=str(model)))
    model = copy_model(model_dir, tmp_path / "cut")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="damaged"):
        generate(replace(generate_config, model=str(model)))
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete"):
        generate(replace(generate_config, model=str(model)))


def test_a_model_is_known_by_its_weights_not_by_its_place(
    generate_config: GenerateConfig, model_dir: Path, tmp_path: Path
) -> None:
    here, there = read_card(generate_config), tmp_path / "copy"
    shutil.copytree(model_dir, there)
    assert read_card(replace(generate_config, model=str(there))).identity == here.identity
    weights = bytearray((there / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (there / "model.safetensors").write_bytes(weights)
    assert read_card(replace(generate_config, model=str(there))).identity != here.identity


def test_a_port_in_use_is_found_before_anything_is_loaded(serve_config: ServeConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(replace(serve_config, port=port, model="not looked at yet"))
    with pytest.raises(UserError, match=r"host: 192\.0\.2\.1 is no address of this machine"):
        check_port("192.0.2.1", 0)
    with pytest.raises(UserError, match="host: no host is no address of this machine"):
        check_port("no host", 0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_may_not_connect_without_a_token(
    serve_config: ServeConfig, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUMOS_SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs a token: set LUMOS_SERVE_TOKEN"):
        serve(replace(serve_config, host=host))


def test_a_default_size_the_model_cannot_write_is_found_before_ray_starts(serve_config: ServeConfig) -> None:
    with pytest.raises(UserError, match="height 20"):
        serve(replace(serve_config, port=free_port(), video=SizeConfig(height=20)))


def test_the_command_that_a_service_prints_holds_one_of_its_tokens(
    serve_config: ServeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    _announce("http://127.0.0.1:1", {}, replace(serve_config, token="alpha,beta"))
    shown = capsys.readouterr().out.partition("Try:\n  curl ")[2]
    environment = {"LUMOS_SERVE_TOKEN": "alpha,beta"}
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {shown}"], env=environment, capture_output=True, text=True)
    assert "Authorization: Bearer alpha" in said.stdout.splitlines()
