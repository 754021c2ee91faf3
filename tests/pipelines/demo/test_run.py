"""The report prints the commands that the demo ran: they resolve to what the phases were given."""

import html
import re
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import group
from lumos.checkpoint import ModelInfo
from pipelines.config import config_to_yaml, load_config
from pipelines.demo import run
from pipelines.tracking import TrackingStore
from pipelines.training.config import TrainConfig
from tests.lumos.models import save_tiny_folder
from tests.pipelines.demo.test_report import make_samples


@pytest.fixture(params=["demo", "with a space, and 'quotes'"])
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The configs that the phases of a demo were given, its samples, and the commands in its report."""
    configs: dict[str, Any] = {}

    def phase(name: str, result: Any) -> Callable[[Any], Any]:
        def called(config: Any) -> Any:
            configs[name] = config
            return result

        return called

    out = tmp_path / request.param
    losses = SimpleNamespace(loss=1.0, step=1, frame_losses=())
    trained = SimpleNamespace(export_dir=out / "train" / "export", steps=1, records=[losses])
    trained.store = TrackingStore.choose(None, out / "train")
    trained.metrics = {"loss_first": 1.0, "loss_last": 1.0, "tokens_per_s": 1.0}
    samples = make_samples(tmp_path, 2)

    def train(config: TrainConfig) -> Any:
        save_tiny_folder(trained.export_dir)
        return phase("train", trained)(config)

    monkeypatch.setattr(run, "connect", nullcontext)
    monkeypatch.setattr(run, "curate", phase("curate", SimpleNamespace(snapshot_uri=str(out / "dataset/snapshots/v"))))
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "generate", phase("generate", None))
    monkeypatch.setattr(run, "judge_folder", lambda *_: samples)
    monkeypatch.setattr(run, "read_ledger", lambda _: [])
    summary = run.demo(out, 3, num_clips=2)
    page = (out / "report.html").read_text(encoding="utf-8")
    commands = [html.unescape(code) for code in re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)]
    return {
        "configs": configs,
        "samples": samples,
        "summary": summary,
        "page": page,
        "commands": [shlex.split(command) for command in commands],
    }


def printed_config(command: list[str]) -> str:
    assert command[0] == "lumos"
    done = CliRunner().invoke(group, [*command[1:], "--print-config"])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_report_prints_the_commands_that_the_demo_ran(ran: dict[str, Any]) -> None:
    assert ran["configs"].keys() == {"curate", "train", "generate"}
    for verb, config in ran["configs"].items():
        command = next(command for command in ran["commands"] if command[1:3] == [verb, "demo"])
        assert printed_config(command) == config_to_yaml(config)
    assert ran["configs"]["train"].seed == 3


def test_one_video_of_the_page_is_made_by_the_command_printed_for_it(ran: dict[str, Any], tmp_path: Path) -> None:
    command = next(command for command in ran["commands"] if command[1:3] == ["generate", "--model"])
    (tmp_path / "one.yaml").write_text(printed_config(command))
    config = load_config(type(ran["configs"]["generate"]), str(tmp_path / "one.yaml"))
    sample, whole = ran["samples"][0], ran["configs"]["generate"]
    assert (config.prompts, config.seed, config.seeds_per_prompt) == ((sample.prompt,), sample.seed, 1)
    # All else that decides a video; batches do not (test_invariance_a_video_does_not_depend_on_its_batch).
    same = {name: getattr(config, name) for name in ("prompts", "output", "seed", "seeds_per_prompt", "batch")}
    assert replace(whole, **same) == config


def test_all_that_the_report_prints_to_try_resolves(ran: dict[str, Any]) -> None:
    commands = [command for command in ran["commands"] if command[0] == "lumos" and "/path/to/videos" not in command]
    assert [command[1] for command in commands] == ["curate", "train", "generate", "generate", "serve", "train"]
    for command in commands[3:]:
        printed_config(command)


def test_the_demo_generates_as_its_model_recommends(ran: dict[str, Any]) -> None:
    recommended = ran["configs"]["train"].recommended_sampling
    assert (recommended.num_steps, recommended.guidance_scale) == (12, 2.0)
    assert ran["configs"]["generate"].sampling.over(recommended) == recommended
    # What a trial at the end of training chose stands in the folder alone, as it does here.
    assert (ran["summary"]["sampling"]["num_steps"], ran["summary"]["sampling"]["history_ratio"]) == (3, 0.7)
    assert "Sampling: 3 steps per latent frame" in ran["page"]
    assert load_config(TrainConfig, "quickstart").recommended_sampling != ModelInfo().sampling
