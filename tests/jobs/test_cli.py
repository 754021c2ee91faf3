import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from jobs.cli import _VERBS, group
from jobs.command import run
from pipelines.config import CONFIG_DIR, shipped_configs
from pipelines.errors import JobError, UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def lumos(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


def test_help_imports_no_framework():
    code = (
        "import sys\nfrom jobs.cli import main\nsys.argv = ['lumos', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print({m for m in sys.modules if m in ('ray', 'torch', 'mlflow', 'pyarrow', 'jinja2', 'matplotlib')})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n"), done.stderr
    for verb in _VERBS:
        assert f"\n  {verb} " in done.stdout


def words_after_usage(text: str) -> list[str]:
    return text.partition("\n\n")[2].split()  # the usage line has the program's name; lines wrap by its width


@pytest.mark.parametrize("verb", _VERBS)
def test_verb_is_a_command_and_a_script_with_the_same_help(verb, tmp_path):
    command = import_module(f"jobs.{verb}").command
    shown = CliRunner().invoke(group, [verb, "--help"])
    assert shown.exit_code == 0, shown.output
    script = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert script.returncode == 0, script.stderr
    assert words_after_usage(script.stdout) == words_after_usage(shown.output)
    assert command.help


def verb_of(kind: str) -> list[str]:
    return {"tokenizer": ["tokenizer", "train"], "tokenizer-evaluation": ["tokenizer", "evaluate"]}.get(kind, [kind])


@pytest.mark.parametrize("kind", ["curate", "train", "generate", "serve", "tokenizer", "tokenizer-evaluation"])
def test_help_names_the_shipped_configs(kind):
    shown = CliRunner().invoke(group, [*verb_of(kind), "--help"]).output
    assert shipped_configs(kind)
    for name in shipped_configs(kind):
        assert f"\n  {name} " in shown


@pytest.mark.parametrize(
    "path", sorted(CONFIG_DIR.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_config_loads_and_prints_itself(path, tmp_path):
    given = {"generate": ["model=m", "prompts=[p]"], "serve": ["model=m"]}.get(path.parent.name, [])
    verb = verb_of(path.parent.name)
    printed = CliRunner().invoke(group, [*verb, path.stem, *given, "--print-config"])
    assert printed.exit_code == 0, printed.exception
    (tmp_path / "again.yaml").write_text(printed.output)
    again = CliRunner().invoke(group, [*verb, str(tmp_path / "again.yaml"), "--print-config"])
    assert again.output == printed.output
    assert path.read_text().startswith("# "), "the first line of a shipped config says what it is for"


@pytest.mark.parametrize(("verb", "missing"), [("generate", ["model", "prompts"]), ("serve", ["model"])])
def test_a_config_that_misses_keys_is_printed_and_names_them(verb, missing, tmp_path):
    printed = CliRunner().invoke(group, [verb, "default", "sampling.num_steps=7", "--print-config"])
    assert printed.exit_code == 0, printed.exception
    notes = "".join(f"# {key}: missing, and has no default\n" for key in missing)
    assert printed.output.startswith(notes)
    values = yaml.safe_load(printed.output)
    assert not values.keys() & set(missing)
    assert values["sampling"]["num_steps"] == 7
    assert values["replicas"]["device"] == "auto"  # in no file: a default
    (tmp_path / "again.yaml").write_text(printed.output)
    given = [f"{key}=x" for key in missing]
    again = CliRunner().invoke(group, [verb, str(tmp_path / "again.yaml"), *given, "--print-config"])
    assert yaml.safe_load(again.output) == {**values, **dict.fromkeys(missing, "x")}
    wrong = CliRunner().invoke(group, [verb, "default", "sampling.num_stepz=7", "--print-config"])
    assert "unknown key 'sampling.num_stepz'" in str(wrong.exception)
    both = str(CliRunner().invoke(group, [verb, "default", "motion=12", "--print-config"]).exception)
    assert "motion must be in 0..9, got 12" in both
    assert f"key '{missing[0]}' is missing" in both
    sent = CliRunner().invoke(group, ["submit", verb, "default", "--address", "http://127.0.0.1:1"])
    assert f"key '{missing[0]}' is missing" in str(sent.exception)  # it is for a job, which needs all


def test_a_list_that_is_too_short_is_no_missing_key():
    printed = CliRunner().invoke(group, ["train", "quickstart", "model.position_scale=[1]", "--print-config"])
    assert str(printed.exception).endswith("model.position_scale: model.position_scale: it has 1 items, and needs more")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["curate"], "Missing argument 'CONFIG'"),
        (["curate", "nosuch"], "error: config 'nosuch' is neither a file nor a shipped curate config"),
        (["curate", "nosuch.mp4"], "error: source.path nosuch.mp4 does not exist"),
        (["curate", "nosuch.yaml"], "error: config 'nosuch.yaml' is neither a file nor a shipped curate config"),
        (["train", "nosuch.yaml"], "error: config 'nosuch.yaml' is neither a file nor a shipped train config"),
        (["demo", "--seed", "-1"], "-1 is not in the range x>=0"),
    ],
)
def test_bad_usage_ends_with_status_2_and_one_message(args, message):
    done = lumos(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such", "source.path no/such does not exist"),
        ("no/such/*.webm", r"no file matches source.path no/such/\*.webm"),
    ],
)
def test_a_source_that_is_not_there_is_named(path, message):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(group, ["curate", path], catch_exceptions=False)


def test_an_unreachable_cluster_is_bad_usage(tmp_path):
    done = lumos("demo", "--out", str(tmp_path / "out"), env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"})
    assert done.returncode == 2
    assert "error: RAY_ADDRESS=127.0.0.1:9: cannot join that cluster" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "status"), [(UserError("no such file"), 2), (JobError("it broke"), 1)])
def test_errors_for_people_are_one_line_and_a_status(monkeypatch, capsys, error, status):
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["fails"])
    with pytest.raises(SystemExit) as ended:
        run(fails)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_keeps_its_traceback_and_ends_with_status_1():
    code = (
        "import click\nfrom jobs.command import run\n\n@click.command()\ndef fails():\n    raise ValueError('oops')\n\n"
        "run(fails)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: oops" in done.stderr


@pytest.mark.timeout(120)
def test_an_error_raised_on_a_ray_worker_is_told_in_one_line(ray_cluster, monkeypatch, capsys):
    import ray

    @ray.remote
    def on_worker() -> None:
        raise UserError("the shard is not there")

    @click.command()
    def fails() -> None:
        ray.get(on_worker.remote())

    monkeypatch.setattr(sys, "argv", ["fails"])
    with pytest.raises(SystemExit) as ended:
        run(fails)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: the shard is not there\n")
