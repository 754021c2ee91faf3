import json
from dataclasses import fields

import numpy as np
import pytest

from lumos.config import TokenizerConfig
from pipelines.config import load_config
from pipelines.data.config import ClipShape, CurateConfig, TokenConfig, area_buckets, plan_shape
from pipelines.data.scores import SCORES, Thresholds, scores_of
from pipelines.data.steps.decide import decide, fills, keeps
from pipelines.errors import UserError

GOOD = {
    "image": 0.0,
    "duration": 5.0,
    "fps": 24.0,
    "width": 640,
    "height": 360,
    "aspect": 16 / 9,
    "picture_share": 1.0,
    "declared_frames": 120,
    "decoded_frames": 120,
    "decoded_share": 1.0,
    "decode_errors": 0.0,
    "brightness": 0.4,
    "dark_share": 0.0,
    "flash_share": 0.0,
    "repeat_share": 0.1,
    "cut": 0.0,
    "freeze": 0.1,
    "sharpness": 300.0,
    "plain_share": 0.3,
    "noise": 0.1,
    "motion": 0.1,
    "motion_time": 0.9,
}


def scores(duration, aspect, image=0.0):
    return {"duration": duration, "aspect": aspect, "height": 720, "image": image}


def test_a_good_clip_is_kept():
    assert set(GOOD) == {score.name for score in scores_of("split")}
    assert decide(GOOD, Thresholds()) == ("kept", "")


@pytest.mark.parametrize(
    ("score", "value", "reason"),
    [
        ("duration", 0.5, "duration 0.5 < 2"),
        ("fps", 4.0, "fps 4 < 8"),
        ("aspect", 4.0, "aspect 4 > 3"),
        ("decoded_share", 0.43, "decoded_share 0.43 < 0.95"),
        ("brightness", 0.001, "brightness 0.001 < 0.02"),
        ("brightness", 0.99, "brightness 0.99 > 0.98"),
        ("dark_share", 0.75, "dark_share 0.75 > 0.5"),
        ("motion_time", 0.008, "motion_time 0.008 < 0.25"),
    ],
)
def test_a_rejection_names_score_value_and_threshold(score, value, reason):
    assert decide(GOOD | {score: value}, Thresholds(min_duration=2.0)) == ("rejected", reason)


def test_every_reason_is_told_and_a_threshold_can_be_switched_off():
    scores = GOOD | {"motion_time": 0.0, "duration": 1.0}
    assert decide(scores, Thresholds(min_duration=2.0))[1] == "duration 1 < 2; motion_time 0 < 0.25"
    assert decide(scores, Thresholds(min_motion_time=None, min_duration=None)) == ("kept", "")


def test_size_thresholds_exist_too():
    thresholds = Thresholds(min_width=1280, min_height=720, min_motion=0.5)
    assert decide(GOOD, thresholds)[1] == "width 640 < 1280; height 360 < 720; motion 0.1 < 0.5"


def test_a_score_that_is_null_passes_no_judgement():
    assert decide(GOOD | {"motion_time": None, "duration": None}, Thresholds()) == ("kept", "")
    assert decide(GOOD | {"motion_time": None, "fps": 1.0}, Thresholds())[1] == "fps 1 < 8"


def test_many_clips_are_decided_as_each_of_them():
    generator = np.random.default_rng(0)
    names = [field.name for field in fields(Thresholds)]
    for _ in range(20):
        # Scores of few values, so that some equal their thresholds.
        columns = {name: generator.integers(0, 5, 300) / 4 for name in SCORES}
        for values in columns.values():
            values[generator.random(300) < 0.1] = np.nan
        limits = {name: None if generator.random() < 0.6 else generator.integers(0, 5) / 4 for name in names}
        rows = [
            {name: None if np.isnan(values[index]) else float(values[index]) for name, values in columns.items()}
            for index in range(300)
        ]
        expected = [decide(row, Thresholds(**limits))[0] == "kept" for row in rows]
        assert keeps(columns, Thresholds(**limits)).tolist() == expected
    assert keeps({}, Thresholds()).tolist() == []


def test_area_buckets_hold_the_release_targets():
    small, large = area_buckets(352 * 352, 32), area_buckets(528 * 528, 32)
    assert (448, 256) in small
    assert (672, 384) in large
    for area, sizes in ((352 * 352, small), (528 * 528, large)):
        assert all(w % 32 == h % 32 == 0 and 0.8 * area < w * h <= area for w, h in sizes)
        assert {(h, w) for w, h in sizes} == set(sizes)


@pytest.mark.parametrize(
    ("duration", "aspect", "expected"),
    [
        (1.0, 1.0, "frames 12 < 17 at 12 fps"),
        (17 / 12, 1.0, ClipShape(17, 352, 352)),
        (1.417, 16 / 9, ClipShape(17, 448, 256)),  # 17 frames at 12 fps, rounded to milliseconds
        (2.0, 9 / 16, ClipShape(17, 256, 448)),
        (60.0, 1.3, ClipShape(49, 384, 288)),
    ],
)
def test_a_clip_gets_the_longest_length_and_the_nearest_aspect(duration, aspect, expected):
    assert plan_shape(scores(duration, aspect), TokenConfig(num_frames=(17, 49))) == expected


def test_sizes_can_be_listed():
    config = TokenConfig(sizes=("448x256", "256x448", "320x320"))
    assert plan_shape(scores(3.0, 1.7), config) == ClipShape(25, 448, 256)


def test_an_image_is_one_frame_of_its_aspect_and_not_asked_for_time():
    assert plan_shape(scores(0.04, 1.7, image=1.0), TokenConfig()) == "frames 1 < 25 at 12 fps"
    assert plan_shape(scores(0.04, 1.7, image=1.0), TokenConfig(num_frames=(1, 25))) == ClipShape(1, 448, 256)
    short = plan_shape(scores(1.0, 1.7), TokenConfig(num_frames=(1, 25)))
    assert short == "frames 12 < 25 at 12 fps"  # a short clip is no image
    image = GOOD | {"image": 1.0, "duration": 0.04, "fps": 25.0, "motion": 0.0, "motion_time": 0.0}
    assert decide(image, Thresholds()) == ("kept", "")
    assert decide(image | {"brightness": 0.0}, Thresholds())[1] == "brightness 0 < 0.02"
    assert decide(image | {"image": 0.0}, Thresholds())[0] == "rejected"


@pytest.mark.parametrize(
    ("height", "aspect", "most", "expected"),
    [
        (256, 1.75, 1.0, ClipShape(25, 448, 256)),
        (255, 1.75, 1.0, "enlargement 1.004 > 1: 446x255 to 448x256 at least"),
        (255, 1.75, 1.01, ClipShape(25, 448, 256)),
        (128, 1.75, None, ClipShape(25, 448, 256)),
        (280, 4 / 3, 1.0, "enlargement 1.029 > 1: 373x280 to 384x288 at least"),
        (352, 1.1, 1.0, ClipShape(25, 352, 320)),
    ],
)
def test_pictures_are_not_enlarged_by_more_than_is_allowed(height, aspect, most, expected):
    clip = scores(3.0, aspect) | {"height": height}
    assert plan_shape(clip, TokenConfig(num_frames=(25,), max_enlargement=most)) == expected
    image = plan_shape(clip | {"image": 1.0}, TokenConfig(num_frames=(1,), max_enlargement=most))
    assert isinstance(image, ClipShape), "an image is enlarged as it takes"


@pytest.mark.parametrize(
    ("fps", "frames", "kept"), [(12, 25, True), (24, 50, True), (24, 49, False), (25, 52, False), (25, 53, True)]
)
def test_the_least_duration_is_that_of_the_shortest_clip(fps, frames, kept):
    config = load_config(CurateConfig, "default", ["tokens.num_frames=[25, 49]"])
    assert config.thresholds.min_duration is None
    clip = GOOD | {"duration": round(frames / fps, 6), "fps": fps}
    assert (decide(clip, config.bounds)[0] == "kept") == kept
    assert isinstance(plan_shape(clip | {"height": 720}, config.tokens), ClipShape) == kept
    longer = load_config(CurateConfig, "default", ["thresholds.min_duration=2.5"])
    assert longer.bounds.min_duration == 2.5
    images = load_config(CurateConfig, "default", ["tokens.num_frames=[1]"])
    assert images.bounds.min_duration is None


@pytest.mark.parametrize("name", ["default", "demo"])
def test_shipped_configs_load(name):
    assert load_config(CurateConfig, name).thresholds.min_motion_time == 0.25


def test_footage_is_encoded_by_the_tokenizer_for_it_and_measured():
    tokens = load_config(CurateConfig, "default").tokens
    assert (tokens.tokenizer, tokens.decode_back_share) == (TokenizerConfig(kind="fsq-footage"), 0.05)
    assert load_config(CurateConfig, "demo").tokens.tokenizer == TokenizerConfig(kind="fsq")
    with pytest.raises(UserError, match=r"tokens\.tokenizer.*kind.*'fsq', 'fsq-footage' or 'cosmos'"):
        load_config(CurateConfig, "default", ["tokens.tokenizer.kind=vqgan"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("thresholds.min_motoin=0.1", "did you mean 'thresholds.min_motion'"),
        ("tokens.fps=-1", "fps must be positive, got -1"),
        ("tokens.num_frames=[16]", "num_frames 16 is not 1 \\+ 4k"),
        ("tokens.sizes=[50x48]", "multiples of 8 px, got 50x48"),
        ("tokens.sizes=[big]", "WIDTHxHEIGHT"),
        ("tokens.batch_size=many", "tokens.batch_size"),
        ("split.detector=magic", "split.detector"),
        ("publish.val_share=1.5", "val_share"),
        ("dataset=''", "dataset is empty"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config(CurateConfig, "demo", [override])


def test_a_threshold_as_text_is_refused():
    with pytest.raises(UserError, match=r"thresholds\.min_duration"):
        load_config(CurateConfig, "demo", [f"thresholds.min_duration={json.dumps('long')}"])


@pytest.mark.parametrize("most", [None, 1.0, 1.3])
def test_what_many_clips_fill_is_what_each_one_fills(most):
    generator = np.random.default_rng(0)
    columns = {
        "duration": generator.uniform(1, 6, 200),
        "aspect": generator.uniform(0.4, 2.6, 200),
        "height": generator.integers(120, 700, 200).astype(float),
        "image": (generator.random(200) < 0.2).astype(float),
    }
    clips = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for config in (TokenConfig(max_enlargement=most), TokenConfig(num_frames=(1, 49), max_enlargement=most)):
        expected = [isinstance(plan_shape(clip, config), ClipShape) for clip in clips]
        assert fills(columns, config).tolist() == expected
        assert 0 < sum(expected) < 200
