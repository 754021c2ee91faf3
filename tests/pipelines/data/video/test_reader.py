from fractions import Fraction

import av
import numpy as np
import pytest

from pipelines.data.video.reader import ClipRequest, pick_frames, read_clip
from pipelines.decoding.errors import VideoError
from pipelines.decoding.video_file import VideoFile
from tests.pipelines.data.videos import numbered, read_numbers, write_video


def request(path, **changes):
    values = {"start_s": 0.0, "end_s": 1e9, "fps": 12.0, "num_frames": 5, "width": 64, "height": 48}
    return ClipRequest(path=str(path), **(values | changes))


def read(path, **changes):
    return read_clip(request(path, **changes), beat=lambda: None)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(12, [0, 1, 2, 3, 4]), (24, [0, 2, 4, 6, 8]), (30, [0, 2, 5, 7, 10]), (6, [0, 0, 1, 1, 2])],
)
def test_frames_are_taken_nearest_to_the_wanted_instants(tmp_path, fps, expected):
    path = write_video(tmp_path / "a.mp4", numbered(40), fps=fps)
    with_decord = read(path, source_frames=40)
    with_pyav = read(path, clean_clock=False)
    assert read_numbers(with_decord) == expected
    assert np.array_equal(with_decord, with_pyav)


def test_a_span_in_the_middle_gives_the_same_frames_however_it_is_reached(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(200), fps=12, options={"preset": "veryfast", "g": "50", "bf": "3"})
    span = {"start_s": 100 / 12, "end_s": 120 / 12, "num_frames": 17}
    by_decord = read(path, **span, source_frames=200)
    by_seek = read(path, **span)  # decord sees 200 frames, not 0, and is not trusted
    from_start = read(path, **span, clean_clock=False)
    assert read_numbers(by_decord) == list(range(100, 117))
    assert np.array_equal(by_decord, by_seek)
    assert np.array_equal(by_decord, from_start)


def test_no_frame_is_taken_from_beyond_the_span(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(40), fps=12)
    for changes in ({"source_frames": 40}, {"clean_clock": False}):
        frames = read(path, start_s=1.0, end_s=1.25, num_frames=5, **changes)
        assert read_numbers(frames) == [12, 13, 14, 14, 14]


def test_variable_frame_rate_goes_by_time(tmp_path):
    times = [0, 1, 2, 3, 4, 20, 40, 41, 42, 43]
    path = write_video(tmp_path / "a.mp4", numbered(10), fps=20, times=times)
    instants = [0.0, 0.5, 1.0, 1.5, 2.0]  # at 2 fps; frames show at 0, .05, .1, .15, .2, 1, 2, ...
    expected = [int(np.abs(np.array(times) / 20 - instant).argmin()) for instant in instants]
    for changes in ({"source_frames": 10}, {"clean_clock": False}):
        assert read_numbers(read(path, fps=2.0, **changes)) == expected


def test_pick_frames_matches_a_plain_search():
    generator = np.random.default_rng(0)
    for _ in range(200):
        times = np.cumsum(generator.uniform(0.01, 0.2, 30)) - 0.01
        start, end = sorted(generator.uniform(0, 3, 2))
        asked = request("", start_s=start, end_s=end, fps=float(generator.uniform(2, 30)), num_frames=9)
        inside = [i for i, time in enumerate(times) if start - 5e-4 <= time < end - 5e-4]
        wanted = [times[inside[0]] + k / asked.fps for k in range(9)] if inside else []
        plain = [min(inside, key=lambda i: (round(abs(times[i] - w), 4), i)) for w in wanted]
        assert pick_frames(times, asked) == plain


def test_the_centre_is_cut_to_the_wanted_shape_and_scaled_by_area(tmp_path):
    frames = np.zeros((9, 64, 128, 3), np.uint8)
    frames[:, :, :32] = (255, 0, 0)
    frames[:, :, 96:] = (0, 0, 255)
    frames[:, :, 32:96] = (90, 90, 90)
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "1"})
    square = read(path, width=32, height=32)
    assert square.shape == (5, 32, 32, 3)
    assert np.abs(square[:, :, 2:-2].astype(int) - 90).max() < 6
    wide = read(path, width=64, height=32)
    assert wide[0, 16, 4, 0] > 200
    assert wide[0, 16, 60, 2] > 200


def test_the_picture_box_and_the_shape_of_pixels_count(tmp_path):
    frames = np.zeros((9, 64, 128, 3), np.uint8)
    frames[:, 16:48] = 200
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "1"})
    inside = read(path, width=64, height=32, picture=(0, 16, 128, 32))
    assert inside.min() > 180
    # Pixels twice as high as wide: 64 px of height are worth 128, so a square holds the full width.
    assert read(path, width=32, height=32, pixel_aspect=0.5).min() < 20


def test_a_turned_picture_is_stood_upright(tmp_path):
    frames = np.zeros((9, 32, 64, 3), np.uint8)
    frames[:, :, 48:] = 255  # right edge white
    path = write_video(tmp_path / "a.mp4", frames, options={"crf": "1"})
    upright = read(path, width=32, height=64, rotation=90)
    assert upright.shape == (5, 64, 32, 3)
    assert upright[0, :12].mean() > 230  # turned counter-clockwise, the right edge is on top
    assert upright[0, -30:].mean() < 20


def test_frames_are_read_defensively(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(30), fps=Fraction(30000, 1001))
    with VideoFile(str(path)) as video:
        times = [frame.time for frame in video.frames()]
    assert len(times) == 30
    assert video.clean_clock
    assert np.allclose(np.diff(times), 1001 / 30000, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("empty.mp4", b"", "empty_file"),
        ("text.mp4", b"hello, this is text\n" * 50, "not_a_video"),
        ("zeros.mp4", bytes(5000), "not_a_video"),
        ("head.mp4", b"\0\0\0\x20ftypisom" + bytes(3000), "damaged_container"),
        ("head.mkv", b"\x1aE\xdf\xa3" + bytes(3000), "damaged_container"),
    ],
)
def test_what_is_no_video_is_told_apart(tmp_path, name, data, code):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(VideoError) as error:
        VideoFile(str(path))
    assert (error.value.code, error.value.transient) == (code, False)


def test_missing_files_and_sound_alone_are_named(tmp_path):
    with pytest.raises(VideoError, match="missing_file"):
        VideoFile(str(tmp_path / "none.mp4"))
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode(None)]:
            container.mux(packet)
    with pytest.raises(VideoError, match="no_video_stream"):
        VideoFile(str(path))


def test_a_clip_that_is_not_there_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(12))
    with pytest.raises(VideoError, match="decode_error"):
        read(path, start_s=5.0, end_s=6.0, source_frames=12)
