import cv2
import numpy as np
import pytest

from lumos.pictures import centre_cut, fit_frames

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((96, 96), (48, 48)),  # OpenCV halves by another rule
        ((144, 144), (48, 48)),
        ((1260, 720), (448, 256)),
        ((333, 201), (80, 48)),
        ((30, 30), (48, 48)),
        ((175, 100), (448, 256)),
        ((100, 300), (150, 200)),
        ((7, 5), (16, 32)),
        ((1, 1), (16, 16)),
    ],
)
def test_frames_are_fitted_as_crops_for_training_are(source: tuple[int, int], size: tuple[int, int]) -> None:
    picture = RNG.integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    left, top, width, height = centre_cut((0, 0, *source), size)
    cut = picture[top : top + height, left : left + width]
    shrinks = width >= size[0] and height >= size[1]
    expected = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    (fitted,) = fit_frames(picture[None], size)
    difference = np.abs(fitted.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < (0.001 if shrinks else 0.06)


def test_frames_of_the_right_size_stay_as_they_are() -> None:
    frames = RNG.integers(0, 256, (5, 16, 32, 3), dtype=np.uint8)
    assert np.array_equal(fit_frames(frames, (32, 16)), frames)
    around = np.pad(frames, ((0, 0), (0, 0), (7, 8), (0, 0)))
    assert np.array_equal(fit_frames(around, (32, 16)), frames)


def test_pixels_that_are_no_squares_count_as_they_are_shown() -> None:
    assert centre_cut((0, 0, 720, 576), (448, 256), pixel_aspect=64 / 45) == (5, 0, 709, 576)
    assert centre_cut((10, 20, 100, 50), (50, 50)) == (35, 20, 50, 50)
    assert centre_cut((0, 0, 100, 50), (50, 50), pixel_aspect=0.5) == (0, 0, 100, 50)
    assert centre_cut((0, 0, 1000, 1), (16, 48)) == (499, 0, 1, 1)
