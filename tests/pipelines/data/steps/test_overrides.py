"""What a person decided goes before scores, duplicates and captions, and is told in the ledger."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.config import TokenConfig
from pipelines.data.keys import clip_key
from pipelines.data.scores import SCORES, Thresholds
from pipelines.data.stage.table import PART
from pipelines.data.steps.clips import Clips
from pipelines.data.steps.overrides import ApplyOverrides, read_overrides
from pipelines.data.steps.split import CLIPS
from pipelines.errors import UserError
from tests.pipelines.data.videos import write_table

IDS = {name: digit * 64 for name, digit in (("a.mp4", "a"), ("b.mp4", "b"), ("gone.mp4", "c"))}
LISTING = pa.table({"path": [*IDS, "copy of b.mp4"]})
KEYS = [clip_key(IDS[name], start, start + 4.0) for name in ("a.mp4", "b.mp4") for start in (0.0, 4.0, 8.0)]
MOTION = (0.0, 0.9, 0.9)  # share of the time in which anything moves, of a source's clips; less than 0.25 is rejected


def run_of(*, height: float = 720.0, duration: float = 4.0) -> SimpleNamespace:
    """Six clips of two sources; a third source was removed from the dataset."""
    scores = {name: 0.5 for name in SCORES} | {"height": height, "aspect": 16 / 9, "duration": duration, "image": 0.0}
    rows = [
        {"work_key": key[:64], "key": key, "scores": scores | {"motion_time": MOTION[number % 3]}}
        for number, key in enumerate(KEYS)
    ]
    table = pa.Table.from_pylist(rows, schema=CLIPS).append_column(PART, pa.array([0] * len(rows), pa.int32()))
    sources = {"path": ["a.mp4", "b.mp4", "copy of b.mp4"], "source_id": [IDS["a.mp4"], IDS["b.mp4"], IDS["b.mp4"]]}
    return SimpleNamespace(
        clips=Clips(table, pa.chunked_array([["u"] * len(rows)]), ["part"]),
        sources=pa.table(sources),
        removed=pa.table({"path": ["gone.mp4"], "source_id": [IDS["gone.mp4"]]}),
    )


def decided(folder, lines, **shape) -> dict[str, tuple[str, str]]:
    """Status and reason by key, after scores and shapes."""
    table = write_table(folder / "overrides.csv", lines, header=("key", "decision", "note"))
    run = run_of(**shape)
    ApplyOverrides(read_overrides(str(table), LISTING)).apply(run)
    nothing = {field.name: None for field in fields(Thresholds)}
    run.clips.decide(Thresholds(**nothing | {"min_motion_time": 0.25}))
    run.clips.plan_shapes(TokenConfig(num_frames=(25,), sizes=("448x256",)))
    columns = run.clips.verdicts.columns({})
    kept = set(run.clips.verdicts.kept.tolist())
    for index in kept:
        assert run.clips.shapes[index].tolist() == [25, 448, 256]
    return dict(zip(KEYS, zip(columns["status"].to_pylist(), columns["reason"].to_pylist(), strict=True), strict=True))


def test_a_clips_decision_goes_before_scores_and_before_its_sources(tmp_path):
    lines = [(KEYS[0], "keep", "a fine  still"), ("copy of b.mp4", "reject", "shaky, all of it"), (KEYS[4], "keep", "")]
    found = decided(tmp_path, lines)
    assert [found[key] for key in KEYS] == [
        ("kept", "override: a fine still (motion_time 0 < 0.25)"),
        ("kept", ""),
        ("kept", ""),
        ("rejected", "override: shaky, all of it"),
        ("kept", "override: by hand"),
        ("rejected", "override: shaky, all of it"),
    ]


def test_what_is_kept_stays_when_it_is_a_duplicate_and_fails_when_it_fails(tmp_path):
    table = write_table(tmp_path / "o.csv", [(IDS["a.mp4"], "keep", "")], header=("key", "decision", "note"))
    run = run_of()
    ApplyOverrides(read_overrides(str(table), LISTING)).apply(run)
    verdicts = run.clips.verdicts
    verdicts.set(1, "duplicate", "near: of x (cosine 0.995)")
    verdicts.set(1, "rejected", "caption: none")
    verdicts.set(2, "failed", "decode_error (permanent): x")
    columns = verdicts.columns({})
    assert columns["status"].to_pylist()[:3] == ["kept", "kept", "failed"]
    assert columns["reason"].to_pylist()[1] == "override: by hand (near: of x (cosine 0.995); caption: none)"


def test_a_small_clip_is_enlarged_and_a_short_one_cannot_be_kept(tmp_path):
    small = decided(tmp_path, [(KEYS[1], "keep", "x")], height=128.0)
    assert small[KEYS[1]] == ("kept", "override: x (enlargement 2 > 1: 228x128 to 448x256 at least)")
    assert small[KEYS[2]][0] == "rejected"
    short = decided(tmp_path, [(KEYS[1], "keep", "x")], duration=1.0)
    assert short[KEYS[1]] == ("rejected", "frames 12 < 25 at 12 fps; override: cannot be kept")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([("a.mp", "keep", "")], r"row 1: key 'a\.mp' .*did you mean 'a\.mp4'"),
        ([("a.mp4", "drop", "")], r"row 1: decision 'drop' of 'a\.mp4' must be keep or reject"),
        ([("a.mp4", "keep", ""), ("b.mp4", "keep", ""), ("a.mp4", "reject", "")], r"row 3: 'a\.mp4' is to be kept and"),
        (
            [(KEYS[0][:-3] + "999", "keep", "")],
            rf"row 1: there is no clip '{KEYS[0][:-3]}999', its source has 3 others",
        ),
        ([("d" * 64 + ":00000000-00004000", "keep", "")], r"there is no clip 'd+:0+-00004000', nor its source"),
        ([("d" * 64, "keep", "")], r"row 1: no source has the source_id 'd+'"),
    ],
)
def test_an_override_of_what_is_not_there_is_told_by_name(tmp_path, lines, words):
    with pytest.raises(UserError, match=words):
        decided(tmp_path, lines)


def test_overrides_of_a_removed_source_say_nothing(tmp_path):
    found = decided(tmp_path, [("gone.mp4", "keep", ""), (clip_key(IDS["gone.mp4"], 0.0, 4.0), "reject", "")])
    assert np.mean([reason == "" for _, reason in found.values()]) == pytest.approx(4 / 6)
