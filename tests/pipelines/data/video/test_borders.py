import numpy as np
import pytest

from pipelines.data.settings import SplitConfig
from pipelines.data.video.borders import BorderMeter, turn_box
from pipelines.data.video.shots import split_source
from tests.pipelines.data.videos import moving_square, write_video


def box(frames):
    meter = BorderMeter()
    for index, frame in enumerate(frames):
        if meter.wants(index * 0.5):
            meter.add(index * 0.5, frame)
    return meter.box()


def picture(height=60, width=100, level=120):
    return np.full((height, width), level, np.uint8)


def test_bars_above_and_below_or_at_the_sides_are_found():
    letterbox, pillarbox, both = picture(), picture(), picture()
    letterbox[:8] = letterbox[-9:] = 1
    pillarbox[:, :20] = pillarbox[:, -20:] = 0
    both[:10] = both[-10:] = both[:, :12] = both[:, -12:] = 0
    assert box([letterbox]) == (0, 8, 100, 43)
    assert box([pillarbox]) == (20, 0, 60, 60)
    assert box([both]) == (12, 10, 76, 40)


def test_what_is_no_bar_is_left_alone():
    dark_sky, night, all_black, thin = picture(), picture(level=2), picture(level=0), picture()
    dark_sky[:20] = 0  # one side only
    night[25:30] = 90  # a light in the dark: the rest would be more than any bar
    thin[:, :1] = 0
    for frame in (picture(), dark_sky, night, all_black, thin):
        assert box([frame]) == (0, 0, 100, 60)
    assert BorderMeter().box() is None


def test_the_brightest_moment_counts():
    dark, bright = picture(), picture()
    dark[:15] = dark[-15:] = 0
    bright[:6] = bright[-6:] = 0
    assert box([dark, bright, dark]) == (0, 6, 100, 48)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_box_turns_with_its_picture(rotation):
    frame = np.zeros((6, 10), int)
    left, top, width, height = 2, 1, 5, 3
    frame[top : top + height, left : left + width] = 1
    turned = np.rot90(frame, rotation // 90)
    left, top, width, height = turn_box((left, top, width, height), (10, 6), rotation)
    assert turned[top : top + height, left : left + width].sum() == 15 == width * height


def test_a_letterboxed_film_is_cropped_to_within_two_pixels_and_measured_inside(tmp_path):
    inside = moving_square(36, size=(256, 96), seed=3)
    film = np.zeros((36, 144, 256, 3), np.uint8)
    film[:, 24:120] = inside
    plain = split_source(str(write_video(tmp_path / "a.mp4", inside)), SplitConfig(), beat=lambda: None)
    path = write_video(tmp_path / "b.mp4", film, options={"preset": "veryfast", "crf": "24"})
    boxed = split_source(str(path), SplitConfig(), beat=lambda: None)
    left, top, width, height = boxed.picture
    assert (left, width) == (0, 256)
    assert abs(top - 24) <= 2
    assert abs(top + height - 120) <= 2
    [clip], [other] = boxed.clips, plain.clips
    assert clip["scores"]["picture_share"] == pytest.approx(2 / 3, abs=0.02)
    assert clip["scores"]["aspect"] == pytest.approx(other["scores"]["aspect"], rel=0.05)
    assert clip["scores"]["brightness"] == pytest.approx(other["scores"]["brightness"], rel=0.05)
