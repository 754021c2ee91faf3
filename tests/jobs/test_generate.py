from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from jobs.cli import group
from pipelines.errors import UserError


def printed(*arguments: str) -> dict:
    done = CliRunner().invoke(group, ["generate", *arguments, "--print-config"])
    assert done.exit_code == 0, done.exception
    return yaml.safe_load(done.output)


def test_the_usual_is_said_by_options():
    config = printed(
        *("--model", "m", "--prompt", "a", "--prompt", "b", "--image", "i.png", "--size", "448x256", "--frames", "25"),
        *("--steps", "4", "--guidance", "7.5", "--seed", "3", "--out", "somewhere"),
    )
    assert (config["model"], config["prompts"], config["image"], config["clip"]) == ("m", ["a", "b"], "i.png", None)
    assert config["video"] == {"width": 448, "height": 256, "num_frames": 25, "fps": None}
    assert (config["sampling"]["num_steps"], config["sampling"]["guidance_scale"]) == (4, 7.5)
    assert (config["seed"], config["output"], config["format"]) == (3, "somewhere", "mp4")
    assert printed("--model", "m", "--prompt", "a", "--continue", "c.mp4")["clip"] == "c.mp4"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "one.gif"], "gif"),
        (["--out", "one.PNG", "--frames", "1"], "png"),
        (["--frames", "1"], "png"),
        (["--frames", "1", "format=gif"], "gif"),
        (["--frames", "5"], "mp4"),
    ],
)
def test_the_format_follows_from_the_name_and_the_number_of_frames(arguments, expected):
    overrides = [argument for argument in arguments if "=" in argument]
    options = [argument for argument in arguments if "=" not in argument]
    assert printed("default", *overrides, "--model", "m", "--prompt", "a", *options)["format"] == expected


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "large", "--size is 'large'; write it as WIDTHxHEIGHT"),
        ("--frames", "26", "--frames 26 is not 1 + 4k: use 25 or 29"),
    ],
)
def test_a_size_that_is_none_is_named_by_its_option(option, value, message):
    done = CliRunner().invoke(group, ["generate", "--model", "m", "--prompt", "a", option, value])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def test_a_file_of_prompts_where_the_config_belongs_is_told_its_key(tmp_path: Path):
    file = tmp_path / "p.csv"
    file.write_text("prompt\na\n")
    done = CliRunner().invoke(group, ["generate", str(file), "model=m"])
    assert isinstance(done.exception, UserError)
    assert f"write prompts={file}" in str(done.exception)


def test_a_benchmarks_layout_says_what_it_needs():
    for overrides, message in (
        (["layout=vbench-i2v", "prompts=info.json"], "layout vbench-i2v needs images"),
        (["layout=geneval", "prompts=info.jsonl"], "wants .png files"),
        (["layout=vbench", "prompts=[a]"], "prompts must be the path of the benchmark's file"),
        (["layout=vbench", "prompts=info.json", "seeds_per_prompt=2"], "set seeds_per_prompt to 1"),
        (["prompts=[a]", "long_prompts=l.txt"], "long_prompts is of benchmarks: set layout"),
    ):
        done = CliRunner().invoke(group, ["generate", "default", "model=m", *overrides])
        assert isinstance(done.exception, UserError)
        assert message in str(done.exception)


@pytest.mark.parametrize(("verb", "more"), [("generate", ["--prompt", "x"]), ("serve", [])])
def test_who_names_no_model_is_told_how(verb, more):
    done = CliRunner().invoke(group, [verb, *more])
    assert isinstance(done.exception, UserError)
    assert "key 'model' is missing; give --model DIR (or model=DIR)" in str(done.exception)


def test_a_folder_without_layout_is_no_benchmark(tmp_path: Path):
    done = CliRunner().invoke(group, ["benchmark", "check", str(tmp_path), "--layout", "vbench"])
    assert isinstance(done.exception, UserError)
    assert "has no generate.json that names the benchmark's file: give --prompts FILE" in str(done.exception)
