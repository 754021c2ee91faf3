"""A score and a captioner are each one place: added by one module and configuration, they go all the way."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.config import config_to_dict
from pipelines.data.snapshot.read import open_snapshot
from tests.pipelines.data.corpora import curate_config
from tests.pipelines.data.videos import moving_square, write_video

ROOT = Path(__file__).resolve().parents[3]

TOY_SCORE = '''
from pipelines.data.scores import Score

def blueness(planes):
    """Mean of Cb, 0 to 1."""
    return float(planes[1].mean()) / 255

SCORES = (Score(name="blueness", unit="share", about="how blue it is", share=True, bounds={"max": None},
                measure=blueness),)
'''

TOY_CAPTIONER = """
from functools import partial
from pipelines.data.captions.captioner import CAPTIONED, Captioner, clean_captions
from pipelines.data.stage.stage import Stage
from pipelines.data.video.looks import decode_jpeg, looks_settings, read_looks

class Toy:
    def __init__(self, uri):
        pass

    def __call__(self, rows):
        done = []
        for row, looks in read_looks(rows):
            text = f"a clip whose mean is {decode_jpeg(looks.middle).mean():.0f}"
            done.append({"work_key": row["work_key"], "key": row["key"], "captions": clean_captions([text], "toy")})
        return done

def stage(config):
    return Stage(name="captions-toy", settings={"version": 1, "looks": looks_settings(config.looks)},
                 schema=CAPTIONED, function=Toy, rows_per_part=8, resources=config.resources.of("captions"))

CAPTIONERS = (Captioner(name="toy", stage_name="captions-toy", stage=stage),)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three clips of like motion, one of them blue."""
    folder = tmp_path_factory.mktemp("plugins") / "videos"
    folder.mkdir()
    gray = moving_square(18, seed=1)
    blue = moving_square(18, seed=2)
    blue[..., :2] //= 3
    write_video(folder / "gray.mp4", gray)
    write_video(folder / "other.mp4", moving_square(18, seed=3))
    write_video(folder / "blue.mp4", blue)
    return folder


def python(plugins: dict[str, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the plugins of some variables."""
    environment = os.environ | {variable: plugin.stem for variable, plugin in plugins.items()}
    folders = dict.fromkeys(str(plugin.parent) for plugin in plugins.values())
    environment["PYTHONPATH"] = ":".join([*folders, str(ROOT)])
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def lumos(plugins: dict[str, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with the plugins of some variables."""
    return python(plugins, "-m", "jobs.cli", *arguments)


def write_config(folder: Path, videos: Path, tokenizer: Path, **changes: dict[str, object]) -> Path:
    """The tests' usual run, as a file, with some sections changed."""
    values = config_to_dict(curate_config(videos, folder / "d", tokenizer))
    values["thresholds"] = {"min_duration": 1.41, "max_cut": None}  # as the usual run: nothing here is footage
    for section, keys in changes.items():
        values[section] |= keys
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True)
class Curated:
    """A curation with both plugins."""

    ledger: dict[str, dict[str, Any]]  # by path
    manifest: dict[str, Any]
    captions: list[str]
    page: str


@pytest.fixture(scope="module")
def curated(tmp_path_factory, videos, tokenizer_file) -> Curated:
    folder = tmp_path_factory.mktemp("plugged")
    plugins = {"LUMOS_SCORES": folder / "toy_score.py", "LUMOS_CAPTIONERS": folder / "toy_captioner.py"}
    plugins["LUMOS_SCORES"].write_text(TOY_SCORE)
    plugins["LUMOS_CAPTIONERS"].write_text(TOY_CAPTIONER)
    toy = {"captioners": ["toy"], "require": True}
    config = write_config(folder, videos, tokenizer_file, thresholds={"max_blueness": 0.55}, captions=toy)
    done = lumos(plugins, "curate", str(config))
    assert done.returncode == 0, done.stderr
    page = folder / "page.html"
    done = lumos(plugins, "data", "report", str(folder / "d"), "--out", str(page))
    assert done.returncode == 0, done.stderr
    [snapshot] = (folder / "d" / "snapshots").iterdir()
    shards = [row for path in snapshot.glob("data/**/*.parquet") for row in pq.read_table(path).to_pylist()]
    return Curated(
        ledger={row["path"]: row for row in open_snapshot(str(snapshot)).read_ledger().to_pylist()},
        manifest=json.loads((snapshot / "manifest.json").read_text()),
        captions=[caption["text"] for row in shards for caption in row["captions"]],
        page=page.read_text(),
    )


@pytest.mark.slow  # a curation on a cluster of its own, as the test below
def test_a_new_score_is_one_line_of_the_table_and_its_function(curated):
    gray, blue, other = (curated.ledger[f"{name}.mp4"] for name in ("gray", "blue", "other"))
    assert gray["status"] == other["status"] == "kept"
    assert gray["scores"]["blueness"] == pytest.approx(0.5, abs=0.05)
    assert blue["status"] == "rejected"
    assert blue["reason"].startswith("blueness 0.")
    assert "thresholds.max_blueness=0.55" in curated.page
    assert "<b>blueness</b>" in curated.page


@pytest.mark.slow
def test_a_new_captioner_is_one_file_and_its_line_in_the_registry(curated):
    assert curated.manifest["captioners"] == ["toy"]
    assert curated.manifest["created_from"]["stage_hashes"]["captions-toy"]
    assert len(curated.captions) == 2
    assert all(caption.startswith("a clip whose mean is ") for caption in curated.captions)
    assert all(caption in curated.page for caption in curated.captions)
    assert "captions-toy" in curated.page


LOAD = """
import sys
from pipelines.config import load_config
from pipelines.data.config import CurateConfig
config = load_config(CurateConfig, sys.argv[1])
"""
USE = f"""{LOAD}
from pipelines.data.captions.registry import captioner_named
from pipelines.data.scores import scores_of
stage = captioner_named(config.captions.captioners[0]).stage(config)
print(config.thresholds.max_blueness, stage.name, stage.function("")([]), scores_of("split")[-1].name)
"""


def test_a_config_may_name_what_plugins_add(tmp_path, videos, tokenizer_file):
    plugins = {"LUMOS_SCORES": tmp_path / "toy_score.py", "LUMOS_CAPTIONERS": tmp_path / "toy_captioner.py"}
    plugins["LUMOS_SCORES"].write_text(TOY_SCORE)
    plugins["LUMOS_CAPTIONERS"].write_text(TOY_CAPTIONER)
    toy = {"captioners": ["toy"]}
    config = str(write_config(tmp_path, videos, tokenizer_file, thresholds={"max_blueness": 0.55}, captions=toy))
    assert python(plugins, "-c", USE, config).stdout == "0.55 captions-toy [] blueness\n"
    refused = python({}, "-c", LOAD, config)
    assert refused.returncode == 1
    assert "max_blueness" in refused.stderr


def load(plugin: dict[str, Path], folder: Path, videos: Path, tokenizer: Path) -> subprocess.CompletedProcess[str]:
    return lumos(plugin, "curate", str(write_config(folder, videos, tokenizer, captions={"captioners": ["toy"]})))


def test_a_captioner_that_no_plugin_adds_is_told(tmp_path, videos, tokenizer_file):
    good = tmp_path / "toy_score.py"
    good.write_text(TOY_SCORE)
    done = load({"LUMOS_SCORES": good}, tmp_path, videos, tokenizer_file)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "there is no captioner 'toy'; name one of given, coca, endpoint" in done.stderr


@pytest.mark.slow  # four starts, for four messages
def test_what_is_not_there_is_told(tmp_path, videos, tokenizer_file):
    nothing = tmp_path / "nothing.py"
    nothing.write_text("")
    mute = tmp_path / "mute_score.py"
    mute.write_text("from pipelines.data.scores import Score\nSCORES = (Score(name='mute', unit='1', about='x'),)\n")
    again = tmp_path / "again.py"
    again.write_text(TOY_CAPTIONER.replace('name="toy"', 'name="given"'))
    for variable, plugin, message in (
        ("LUMOS_CAPTIONERS", again, "LUMOS_CAPTIONERS adds a captioner whose name or stage_name there is already"),
        ("LUMOS_SCORES", mute, "LUMOS_SCORES: the score 'mute' says no measure"),
        ("LUMOS_SCORES", tmp_path / "absent.py", "LUMOS_SCORES names absent, from which SCORES cannot be imported"),
        ("LUMOS_CAPTIONERS", nothing, "LUMOS_CAPTIONERS names nothing, from which CAPTIONERS cannot be imported"),
    ):
        done = load({variable: plugin}, tmp_path, videos, tokenizer_file)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert message in done.stderr
