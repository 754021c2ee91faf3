import numpy as np
import pytest

from pipelines.media import psnr


def test_psnr_is_that_of_all_frames():
    frames = np.full((3, 8, 8, 3), 100, np.uint8)
    other = frames.copy()
    other[0] = 116  # a mean squared error of 256 / 3
    assert psnr(frames, other) == pytest.approx(10 * np.log10(255**2 * 3 / 256))
    assert psnr(other, frames) == psnr(frames, other), "no wrap-around of unsigned differences"
    assert psnr(frames, frames) == 99.0
