import io

import av
import numpy as np
import pytest

from pipelines.media import encode_video, psnr


def moving_square(num_frames: int, size: int = 48) -> np.ndarray:
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    frames[:] = (90, 120, 90)
    for i in range(num_frames):
        frames[i, 10:30, i : i + 20] = (220, 30, 30)
    return frames


def decode(data: bytes) -> tuple[np.ndarray, float]:
    with av.open(io.BytesIO(data)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 12.0), (17, 12.0), (25, 23.976), (9, 8.0)])
def test_mp4_holds_the_frames_at_their_rate_in_the_form_that_plays_everywhere(num_frames: int, fps: float) -> None:
    frames = moving_square(num_frames)
    data = encode_video(frames, fps)
    shown, rate = decode(data)
    assert shown.shape == frames.shape
    assert rate == pytest.approx(fps, rel=1e-4)
    # 4:2:0 blurs colour at edges; inside areas it must be right.
    inside = np.abs(shown[:, 14:26, num_frames + 2 : 16].astype(int) - frames[:, 14:26, num_frames + 2 : 16])
    assert inside.size == 0 or inside.max() <= 4
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.start_time == 0
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize("size", [16, 32, 48])
def test_equal_frames_give_equal_bytes(size: int) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (9, size // 8, size // 8, 3), dtype=np.uint8)  # as an untrained tokenizer draws
    frames = blocks.repeat(8, axis=1).repeat(8, axis=2)
    assert len({encode_video(frames.copy(), 12.0) for _ in range(30)}) == 1


def test_gif_holds_the_frames() -> None:
    frames = moving_square(9)
    shown, rate = decode(encode_video(frames, 12.5, "gif"))
    assert rate == pytest.approx(12.5)
    np.testing.assert_array_equal(shown, frames)


def test_png_holds_an_image_exactly_and_no_video() -> None:
    frames = moving_square(5)
    shown, _ = decode(encode_video(frames[:1], 12.0, "png"))
    np.testing.assert_array_equal(shown, frames[:1])
    with pytest.raises(ValueError, match="one frame, got 5"):
        encode_video(frames, 12.0, "png")


@pytest.mark.parametrize("frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((5, 8, 8, 3)), np.zeros((5, 8, 8))])
def test_other_arrays_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 frames"):
        encode_video(frames, 12.0)


def test_psnr_is_that_of_all_frames():
    frames = np.full((3, 8, 8, 3), 100, np.uint8)
    other = frames.copy()
    other[0] = 116  # a mean squared error of 256 / 3
    assert psnr(frames, other) == pytest.approx(10 * np.log10(255**2 * 3 / 256))
    assert psnr(other, frames) == psnr(frames, other), "no wrap-around of unsigned differences"
    assert psnr(frames, frames) == 99.0
