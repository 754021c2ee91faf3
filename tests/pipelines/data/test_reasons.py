"""Reasons: their texts, which published ledgers hold, and that what was written is what is parsed."""

import subprocess
import sys

import pyarrow as pa
import pytest

from pipelines.data import reasons
from pipelines.data.reasons import Failure, parse_failure

KEY = f"{'a' * 64}:00001000-00002500"
# Every kind of reason as it is written, its text, and its class.
TEXTS = [
    (reasons.below("motion_time", 0.0081234, 0.25), "motion_time 0.008123 < 0.25", "motion_time"),
    (reasons.above("width", 20000.0, 16384), "width 2e+04 > 1.638e+04", "width"),
    (
        reasons.all_of([reasons.below("fps", 4, 8), reasons.above("dark_share", 1, 0.5)]),
        "fps 4 < 8; dark_share 1 > 0.5",
        "fps",
    ),
    (reasons.too_few_frames(12, 17, 12.0), "frames 12 < 17 at 12 fps", "frames"),
    (reasons.near_duplicate(KEY, 0.99149), f"near: of {KEY} (cosine 0.991)", "near"),
    (reasons.exact_duplicate("a" * 64), f"exact: of {'a' * 64}", "exact"),
    (reasons.REMOVED, "removed: taken out of the dataset", "removed"),
    (reasons.no_caption([]), "caption: none", "caption"),
    (
        reasons.no_caption([reasons.too_few_words(2, 3), reasons.other_language("de")]),
        "caption: words 2 < 3; language de",
        "caption",
    ),
    (
        str(Failure("decode_error", "frame 3: bad", transient=True)),
        "decode_error (transient): frame 3: bad",
        "decode_error",
    ),
    (str(Failure("no_frames", "", transient=False)), "no_frames (permanent): ", "no_frames"),
    ("", "", ""),
]


@pytest.mark.parametrize(("written", "text", "_"), TEXTS)
def test_texts_stay_as_published_ledgers_have_them(written, text, _):
    assert written == text


def test_classes_are_told_one_by_one_and_all_at_once():
    written, _, classes = zip(*TEXTS, strict=True)
    pieces = pa.chunked_array([written[:3], [], written[3:]], pa.string())
    assert tuple(reasons.reason_classes(pieces).to_pylist()) == classes


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("detail", ["", "plain", "a: b (c): d", "(permanent): no", "two\nlines"])
def test_a_failure_is_parsed_as_it_was_written(detail, transient):
    failure = Failure("decode_error", detail, transient=transient)
    assert parse_failure(str(failure)) == failure
    assert failure.kind == f"decode_error ({'transient' if transient else 'permanent'})"


def test_a_failure_is_called_by_its_code_and_its_class_only():
    failure = parse_failure("decode_error (transient): permanent damage")
    assert (failure.code, failure.failure_class) == ("decode_error", "transient")
    assert parse_failure("something else").kind == "something else (permanent)"


def test_what_a_row_is_a_duplicate_of_is_parsed_and_of_no_other_row():
    near, exact = reasons.near_duplicate(KEY, 1.0), reasons.exact_duplicate("a" * 64)
    assert reasons.parse_duplicate(near) == ("near", KEY)
    assert reasons.parse_duplicate(exact) == ("exact", "a" * 64)
    others = [text for _, text, kind in TEXTS if kind not in ("near", "exact")]
    assert {reasons.parse_duplicate(text) for text in others} == {None}


def test_captions_are_counted_by_the_rule_they_break():
    faults = [reasons.too_few_words(2, 3), reasons.too_many_words(12345, 10000), reasons.other_language("de")]
    assert faults == ["words 2 < 3", "words 12345 > 10000", "language de"]
    assert list(map(reasons.caption_fault_kind, faults)) == ["words < 3", "words > 10000", "language de"]


def test_reasons_and_keys_are_at_hand_without_video_models_and_ray():
    script = (
        "import sys, pipelines.data.reasons, pipelines.data.keys; print({'torch', 'av', 'ray'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
