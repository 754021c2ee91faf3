"""A score and a captioner are each one place: added by one module and configuration, they go all the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.config import config_to_dict
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
    """Two clips of like motion, one of them blue."""
    folder = tmp_path_factory.mktemp("plugins") / "videos"
    folder.mkdir()
    gray = moving_square(18, seed=1)
    blue = moving_square(18, seed=2)
    blue[..., :2] //= 3
    write_video(folder / "gray.mp4", gray)
    write_video(folder / "blue.mp4", blue)
    return folder


def lumos(variable: str, plugin: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {variable: plugin.stem, "PYTHONPATH": f"{plugin.parent}:{ROOT}"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def write_config(folder: Path, videos: Path, tokenizer: Path, **changes: dict[str, object]) -> Path:
    """The tests' usual run, as a file, with some sections changed."""
    values = config_to_dict(curate_config(videos, folder / "d", tokenizer))
    values["thresholds"] = {"min_duration": 1.41}
    for section, keys in changes.items():
        values[section] |= keys
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def ledger_of(dataset: Path) -> dict[str, dict[str, object]]:
    [path] = dataset.glob("snapshots/*/ledger.parquet")
    return {row["path"]: row for row in pq.read_table(path).to_pylist()}


def test_a_new_score_is_one_line_of_the_table_and_its_function(tmp_path, videos, tokenizer_file):
    plugin = tmp_path / "toy_score.py"
    plugin.write_text(TOY_SCORE)
    config = write_config(
        tmp_path, videos, tokenizer_file, thresholds={"max_blueness": 0.55}, captions={"require": False}
    )
    done = lumos("LUMOS_SCORES", plugin, "curate", str(config))
    assert done.returncode == 0, done.stderr
    rows = ledger_of(tmp_path / "d")
    assert rows["gray.mp4"]["status"] == "kept"
    assert rows["gray.mp4"]["scores"]["blueness"] == pytest.approx(0.5, abs=0.05)
    assert rows["blue.mp4"]["status"] == "rejected"
    assert rows["blue.mp4"]["reason"].startswith("blueness 0.")
    page = tmp_path / "page.html"
    done = lumos("LUMOS_SCORES", plugin, "data", "report", str(tmp_path / "d"), "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "thresholds.max_blueness=0.55" in page.read_text()
    assert "<b>blueness</b>" in page.read_text()


def test_a_new_captioner_is_one_file_and_its_line_in_the_registry(tmp_path, videos, tokenizer_file):
    plugin = tmp_path / "toy_captioner.py"
    plugin.write_text(TOY_CAPTIONER)
    config = write_config(tmp_path, videos, tokenizer_file, captions={"captioners": ["toy"], "require": True})
    done = lumos("LUMOS_CAPTIONERS", plugin, "curate", str(config))
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in ledger_of(tmp_path / "d").values()} == {"kept"}
    [manifest] = (tmp_path / "d").glob("snapshots/*/manifest.json")
    found = json.loads(manifest.read_text())
    assert found["captioners"] == ["toy"]
    assert found["created_from"]["stage_hashes"]["captions-toy"]
    captions = [
        caption["text"]
        for path in (tmp_path / "d").glob("snapshots/*/data/**/*.parquet")
        for row in pq.read_table(path).to_pylist()
        for caption in row["captions"]
    ]
    assert len(captions) == 2
    assert all(caption.startswith("a clip whose mean is ") for caption in captions)
    page = tmp_path / "page.html"
    done = lumos("LUMOS_CAPTIONERS", plugin, "data", "report", str(tmp_path / "d"), "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "a clip whose mean is " in page.read_text()
    assert "captions-toy" in page.read_text()


def test_what_is_not_there_is_told(tmp_path, videos, tokenizer_file):
    config = write_config(tmp_path, videos, tokenizer_file, captions={"captioners": ["toy"]})
    nothing = tmp_path / "nothing.py"
    nothing.write_text("")
    good = tmp_path / "toy_score.py"
    good.write_text(TOY_SCORE)
    mute = tmp_path / "mute_score.py"
    mute.write_text("from pipelines.data.scores import Score\nSCORES = (Score(name='mute', unit='1', about='x'),)\n")
    again = tmp_path / "again.py"
    again.write_text(TOY_CAPTIONER.replace('name="toy"', 'name="given"'))
    for variable, plugin, message in (
        ("LUMOS_CAPTIONERS", again, "LUMOS_CAPTIONERS adds a captioner whose name or stage_name there is already"),
        ("LUMOS_SCORES", mute, "LUMOS_SCORES: the score 'mute' says no measure"),
        ("LUMOS_SCORES", tmp_path / "absent.py", "LUMOS_SCORES names absent, from which SCORES cannot be imported"),
        ("LUMOS_CAPTIONERS", nothing, "LUMOS_CAPTIONERS names nothing, from which CAPTIONERS cannot be imported"),
        ("LUMOS_SCORES", good, "there is no captioner 'toy'; name one of given, coca, endpoint"),
    ):
        done = lumos(variable, plugin, "curate", str(config))
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert message in done.stderr
