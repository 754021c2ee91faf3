import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from pipelines import config as config_module
from pipelines.config import (
    config_hash,
    config_to_dict,
    config_to_yaml,
    find_config,
    load_config,
    provenance,
    shipped_configs,
)
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    KIND: ClassVar[str] = "example"

    steps: int
    name: str = "run"
    verbose: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    tracking: Optimizer | None = None
    sources: tuple[Source, ...] = ()


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return _write


def test_reads_nested_values_of_every_kind(write):
    loaded = load_config(
        ExampleConfig,
        write(
            "steps: 1_000\nname: no\nverbose: true\noptimizer: {lr: 1e-4, betas: [0.9, 1]}\n"
            "sources:\n  - path: a/b.mp4\n  - {path: 'c d', limit: 010}\n"
        ),
    )
    assert loaded == ExampleConfig(
        steps=1000,
        name="no",
        verbose=True,
        optimizer=Optimizer(lr=1e-4, betas=(0.9, 1.0)),
        sources=(Source(path=Path("a/b.mp4")), Source(path=Path("c d"), limit=10)),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5E+3", 1500.0), (".5", 0.5), ("-2.", -2.0), ("3", 3.0)],
)
def test_floats_in_every_spelling(write, text, value):
    assert load_config(ExampleConfig, write("steps: 1"), [f"optimizer.betas=[{text}, 1.0]"]).optimizer.betas[0] == value


@pytest.mark.parametrize("text", ["1:30", "off", "Yes", "2024-01-01", "0x1f", "1.2.3", "e5", "True"])
def test_yaml_surprises_stay_text(write, text):
    assert load_config(ExampleConfig, write(f"steps: 1\nname: {text}")).name == text


def test_overrides_come_after_the_file_in_order(write):
    path = write("steps: 1\noptimizer: {lr: 1.0}\ntracking: null\nsources: [{path: a}]")
    overrides = ["steps=2", "optimizer.lr=0.5", "optimizer.lr=0.25", "tracking.kind=sgd", "sources.0.limit=7", "name="]
    with pytest.raises(UserError, match=r"name: .*valid string, got None"):
        load_config(ExampleConfig, path, overrides)
    loaded = load_config(ExampleConfig, path, [*overrides[:-1], "name=a=b"])
    assert (loaded.steps, loaded.optimizer.lr, loaded.name) == (2, 0.25, "a=b")
    assert loaded.tracking == Optimizer(kind="sgd")
    assert loaded.sources[0].limit == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\noptimizer: {lrr: 2}", "unknown key 'optimizer.lrr' = 2; did you mean 'optimizer.lr'?"),
        ("steps: 1\ntracking: {lrr: 2}", "unknown key 'tracking.lrr' = 2; did you mean 'tracking.lr'?"),
        (
            "steps: 1\nsources: [{path: a}, {paht: b}]",
            "unknown key 'sources.1.paht' = 'b'; did you mean 'sources.1.path'?",
        ),
        ("steps: 1\noptimizer: {betas: [.9, .inf]}", "optimizer.betas.1: inf is no finite number"),
        ("steps: 1\noptimizer: {lr: .nan}", "optimizer.lr: nan is no finite number"),
        ("steps: 1\nxyz: 2", "unknown key 'xyz' = 2; known here: name, optimizer, sources, steps, tracking, verbose"),
        ("steps: two", "steps: input should be a valid integer, got 'two'"),
        ("steps: 1.0", "steps: input should be a valid integer, got 1.0"),
        ("steps: true", "steps: input should be a valid integer, got True"),
        ("steps: 1\nname: 3", "name: input should be a valid string, got 3; quote it to make it text"),
        ("steps: 1\noptimizer: {betas: [0.1]}", "optimizer.betas: it has 1 items, and needs more"),
        ("steps: 1\noptimizer: {kind: adam}", "optimizer.kind: input should be 'adamw' or 'sgd', got 'adam'"),
        ("steps: 1\noptimizer: {lr: -1}", "optimizer: lr must be positive, got -1.0"),
        ("steps: 1\noptimizer: 5", "optimizer: "),
        ("name: a", "key 'steps' is missing; it has no default"),
        ("", "key 'steps' is missing; it has no default"),
        ("steps: 1\nsources: [{limit: 1}]", "key 'sources.0.path' is missing; it has no default"),
        ("steps: 1\nsteps: 2", "key 'steps' occurs twice"),
        ("steps: 1\n3: 2", "key 3 is not text"),
        ("[1, 2]", "expected a mapping"),
        ("steps: [1", "run.yaml"),
    ],
)
def test_bad_files_are_refused_with_key_value_and_remedy(write, text, message):
    path = write(text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        load_config(ExampleConfig, path)
    assert path in str(raised.value)


def test_every_error_of_a_file_is_told_at_once(write):
    with pytest.raises(UserError) as raised:
        load_config(ExampleConfig, write("steps: x\nverbose: 1\noptimzer: {}"))
    assert len(str(raised.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key.path=value"),
        ("=1", "expected key.path=value"),
        ("optimizer..lr=1", "expected key.path=value"),
        ("optimizer.lr=[1", "the value is not YAML"),
        ("steps.more=1", "steps is 1, it has no keys of its own"),
        ("sources.3.limit=1", "sources has items 0 to 0, not '3'"),
        (
            "optimiser.lr=1",
            "with overrides of optimiser.lr: unknown key 'optimiser' = {'lr': 1}; did you mean 'optimizer.lr'",
        ),
    ],
)
def test_bad_overrides_are_refused(write, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(ExampleConfig, write("steps: 1\nsources: [{path: a}]"), [override])


def test_shipped_names_and_paths(tmp_path, monkeypatch):
    folder = tmp_path / "example"
    folder.mkdir()
    (folder / "small.yaml").write_text("steps: 5")
    monkeypatch.setattr(config_module, "CONFIG_DIR", tmp_path)
    assert shipped_configs("example") == ["small"]
    assert find_config("example", "small") == folder / "small.yaml"
    assert load_config(ExampleConfig, "small").steps == 5
    with pytest.raises(UserError, match=r"'smal' is neither a file nor a shipped example config \(small\)"):
        load_config(ExampleConfig, "smal")
    with pytest.raises(UserError, match="neither a file"):
        load_config(ExampleConfig, "../example/small")
    with pytest.raises(UserError, match="it is a folder: name a YAML file"):
        load_config(ExampleConfig, str(folder))
    with pytest.raises(UserError, match=r"'output=a' is neither .* the config comes before KEY=VALUE"):
        load_config(ExampleConfig, "output=a")


def test_dict_and_yaml_and_back(write, tmp_path):
    loaded = load_config(ExampleConfig, write("steps: 1\nname: 'true'\nsources: [{path: a b}]\ntracking: {lr: 1e-9}"))
    assert json.loads(json.dumps(config_to_dict(loaded))) == config_to_dict(loaded)
    (tmp_path / "again.yaml").write_text(config_to_yaml(loaded))
    assert load_config(ExampleConfig, str(tmp_path / "again.yaml")) == loaded


def test_hash_ignores_key_order_and_sees_values():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert re.fullmatch("[0-9a-f]{16}", config_hash({}))
    assert config_hash(ExampleConfig(steps=1)) != config_hash(ExampleConfig(steps=2))
    assert config_hash(ExampleConfig(steps=1)) == config_hash(config_to_dict(ExampleConfig(steps=1)))
    with pytest.raises(TypeError):
        config_hash({"a": object()})


def test_provenance_names_commit_and_versions(tmp_path, monkeypatch):
    assert provenance()["packages"]["numpy"].count(".") == 2
    monkeypatch.setattr(config_module, "PROJECT_DIR", tmp_path)
    assert provenance()["git_commit"] == "unknown"
    monkeypatch.setenv("LUMOS_GIT_COMMIT", "abc")
    assert provenance()["git_commit"] == "abc"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", provenance()["git_commit"])
    (tmp_path / "file").write_text("two")
    assert provenance()["git_commit"].endswith("-dirty")
