import av
import cv2
import numpy as np
import pytest

from pipelines.benchmarks import patterns
from pipelines.config import load_config
from pipelines.data.config import CurateConfig
from pipelines.data.settings import SplitConfig
from pipelines.data.video.graphics import noisiness, plain_share
from pipelines.data.video.shots import split_source
from tests.pipelines.data.video.test_film import CLIPS
from tests.pipelines.data.videos import write_video

SIZE = (256, 144)


@pytest.fixture(scope="module")
def limits():
    thresholds = load_config(CurateConfig, "default").thresholds
    return thresholds.max_plain_share, thresholds.max_noise


def lumas(frames):
    return [cv2.cvtColor(cv2.resize(frame, SIZE, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for frame in frames]


@pytest.mark.parametrize("kind", patterns.KINDS)
def test_what_no_camera_made_is_above_the_default_thresholds(kind, limits, monkeypatch):
    monkeypatch.setattr(patterns, "_COUNT", 4)
    for number in range(4):
        pictures = lumas(patterns.KINDS[kind](number, np.random.default_rng(number))[1:])
        plain, noise = (np.mean([measure(luma) for luma in pictures]) for measure in (plain_share, noisiness))
        assert (plain > limits[0]) != (noise > limits[1]), (number, plain, noise)
        assert (noise > limits[1]) == (kind == "noise")


def test_frames_of_a_film_are_far_below_them(limits):
    with av.open(str(CLIPS / "sintel_10s.mp4")) as container:
        frames = [
            frame.to_ndarray(format="rgb24") for _, frame in zip(range(60), container.decode(video=0), strict=False)
        ]
    for luma in lumas(frames[12::12]):
        assert plain_share(luma[20:-20]) < limits[0] - 0.2  # between its black bars
        assert noisiness(luma) < limits[1] - 0.2


def test_what_is_too_small_or_flat_to_tell_is_nothing():
    assert plain_share(np.zeros((8, 64), np.uint8)) == 0.0
    assert noisiness(np.full((64, 64), 9, np.uint8)) == 0.0


def test_black_bars_are_no_part_of_what_is_plain(tmp_path):
    generator = np.random.default_rng(0)
    picture = cv2.GaussianBlur(generator.normal(128, 900, (128, 256, 3)), (0, 0), 5).clip(0, 255).astype(np.uint8)
    frames = np.stack([np.roll(picture, 3 * index, axis=1) for index in range(12)])
    barred = np.zeros((12, 192, 256, 3), np.uint8)
    barred[:, 32:160] = frames
    found = []
    for name, each in (("whole", frames), ("barred", barred)):
        path = write_video(tmp_path / f"{name}.mp4", each)
        [clip] = split_source(str(path), SplitConfig(detector="none"), beat=lambda: None).clips
        found.append(clip["scores"]["plain_share"])
    assert found[0] < 0.5
    assert found[1] == pytest.approx(found[0], abs=0.1)
