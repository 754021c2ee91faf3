import numpy as np
import pytest
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

from pipelines.data.settings import SplitConfig
from pipelines.data.video.meter import changed_share
from pipelines.data.video.shots import FastAdaptiveDetector, FastContentDetector, split_source
from pipelines.decoding.errors import VideoError
from tests.pipelines.data.videos import moving_square, still, write_video


def split(path, **config):
    return split_source(str(path), SplitConfig(**config), beat=lambda: None)


def scores(path):
    [clip] = split(path, detector="none").clips
    return clip["scores"]


def shots(lengths, size=(128, 96)):
    """Moving squares over clearly different backgrounds, one per shot."""
    colours = [(20, 30, 160), (200, 170, 30), (30, 160, 60), (180, 40, 150)]
    parts = []
    for index, length in enumerate(lengths):
        part = moving_square(length, size=size, seed=index) // 3
        parts.append((part + np.array(colours[index % 4]) // 2).astype(np.uint8))
    return np.concatenate(parts)


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_cuts_are_found_at_their_frames(tmp_path, detector):
    path = write_video(tmp_path / "a.mp4", shots([30, 50, 40]), fps=20)
    clips = split(path, detector=detector).clips
    assert [(clip["start_s"], clip["end_s"]) for clip in clips] == [(0.0, 1.5), (1.5, 4.0), (4.0, 6.0)]


@pytest.mark.parametrize("fps", [50, 60, 240])
def test_a_cut_between_fast_frames_is_one_edge(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", shots([fps // 2 + 7, fps // 2 + 1]), fps=fps)
    clips = split(path).clips
    assert [round(clip["start_s"] * fps) for clip in clips] == [0, fps // 2 + 7]
    assert max(clip["scores"]["cut"] for clip in clips) < 0.5


def test_long_shots_are_divided_evenly_and_nothing_is_lost(tmp_path):
    path = write_video(tmp_path / "a.mp4", shots([30, 90]), fps=20)
    clips = split(path, max_seconds=2.0).clips
    assert [(clip["start_s"], clip["end_s"]) for clip in clips] == [(0, 1.5), (1.5, 3.0), (3.0, 4.5), (4.5, 6.0)]
    assert sum(clip["scores"]["duration"] for clip in clips) == pytest.approx(6.0)


def test_a_stride_cuts_by_the_clock(tmp_path):
    path = write_video(tmp_path / "a.mp4", shots([30, 30]), fps=20)
    clips = split(path, detector="stride", max_seconds=1.25).clips
    assert [(clip["start_s"], clip["end_s"]) for clip in clips] == [(0, 1.25), (1.25, 2.5), (2.5, 3.0)]


def test_what_a_file_is_gets_measured(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(30, size=(96, 64)), fps=20)
    source = split(path)
    [clip] = source.clips
    assert (source.source_frames, source.codec, source.rotation) == (30, "h264", 0)
    found = clip["scores"]
    assert (found["width"], found["height"], found["aspect"]) == (96, 64, 1.5)
    assert (found["duration"], found["fps"]) == (1.5, 20.0)
    assert (found["declared_frames"], found["decoded_frames"], found["decoded_share"]) == (30, 30, 1.0)


def test_brightness_tells_black_and_white(tmp_path):
    black = scores(write_video(tmp_path / "black.mp4", still(level=0)))
    white = scores(write_video(tmp_path / "white.mp4", still(level=255)))
    assert (black["brightness"], black["dark_share"]) == (0.0, 1.0)
    assert white["brightness"] > 0.99
    assert white["dark_share"] == 0.0


def test_a_still_shot_is_told_from_a_still_camera_with_a_small_moving_subject(tmp_path):
    size = (320, 240)
    nothing = scores(write_video(tmp_path / "a.mp4", still(48, size=size), fps=24))
    small = scores(write_video(tmp_path / "b.mp4", moving_square(48, size=size, side=12), fps=24))
    assert nothing["motion_time"] == 0.0
    assert small["motion_time"] == 1.0
    assert small["motion"] < 0.03  # most of the picture stands still


def test_a_subject_as_bright_as_its_background_moves(tmp_path):
    frames = np.full((24, 96, 96, 3), (116, 80, 56), np.uint8)  # brown, of the same luma as the red below
    for index in range(24):
        frames[index, 32:64, 3 * index : 3 * index + 24] = (208, 38, 44)
    assert scores(write_video(tmp_path / "a.mp4", frames))["motion_time"] == 1.0


def test_grain_and_hard_compression_are_no_motion(tmp_path):
    generator = np.random.default_rng(0)
    picture = still(48, size=(320, 240)).astype(np.float32)
    grainy = np.clip(picture + generator.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    crushed = {"preset": "veryfast", "crf": "32", "g": "48"}
    for name, options in (("fine", {"preset": "veryfast", "crf": "10"}), ("crushed", crushed)):
        path = write_video(tmp_path / f"{name}.mp4", grainy, fps=24, options=options)
        assert scores(path)["motion_time"] < 0.2, name


def test_motion_does_not_depend_on_the_codec(tmp_path):
    frames = moving_square(36, size=(128, 96))
    found = [
        scores(write_video(tmp_path / "a.mp4", frames)),
        scores(write_video(tmp_path / "b.webm", frames, codec="libvpx-vp9", options={"crf": "20", "b:v": "0"})),
        scores(write_video(tmp_path / "c.avi", frames, codec="mpeg4", options={"q:v": "2"})),
    ]
    for score in found:
        assert score["motion_time"] == 1.0
        assert score["motion"] == pytest.approx(found[0]["motion"], rel=0.25)


def test_a_slide_that_is_turned_moves_hardly_ever(tmp_path):
    slides = np.concatenate([still(120, level=level) for level in (200, 90, 230)])
    assert scores(write_video(tmp_path / "a.mp4", slides, fps=24))["motion_time"] < 0.1


def test_a_picture_that_stands_for_long_moves_as_little_as_it_is_frozen(tmp_path):
    frames = moving_square(6, size=(128, 96))
    frozen = np.concatenate([frames, frames[-1:], frames[-1:]])
    found = scores(write_video(tmp_path / "a.mp4", frozen, fps=24, times=[0, 1, 2, 3, 4, 5, 6, 65]))
    assert found["freeze"] > 2.4
    assert found["motion_time"] < 0.1


def test_slides_of_a_frame_each_stand_still_until_the_next(tmp_path):
    slides = np.stack([moving_square(1, size=(128, 96), seed=seed)[0] for seed in range(5)])
    path = write_video(tmp_path / "a.mp4", slides, fps=24, times=[0, 48, 144, 192, 193])
    found = scores(path)
    assert found["freeze"] == pytest.approx(4.0)
    assert found["motion_time"] < 0.15


def test_a_truncated_file_decodes_in_part(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(60, size=(128, 96)), options={"crf": "5", "g": "10"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    found = split(path).clips[0]["scores"]
    assert found["declared_frames"] == 60
    assert 0.2 < found["decoded_share"] < 0.8


def test_damage_in_the_middle_does_not_end_the_pass(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(60, size=(128, 96)), options={"crf": "5", "g": "10"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 20] = bytes(len(data) // 20)
    path.write_bytes(data)
    source = split(path)
    assert source.source_frames > 40
    assert source.clips[-1]["end_s"] == pytest.approx(5.0, abs=0.3)


def test_errors_that_the_decoder_conceals_are_counted_where_they_are(tmp_path, capfd):
    options = {"preset": "veryfast", "crf": "5", "g": "10", "threads": "1"}
    path = write_video(tmp_path / "a.mp4", moving_square(60, size=(128, 96), seed=1), options=options)
    cut = {"detector": "stride", "max_seconds": 2.5}
    assert [clip["scores"]["decode_errors"] for clip in split(path, **cut).clips] == [0, 0]
    data = bytearray(path.read_bytes())
    for number in range(5):
        data[3 * len(data) // 4 + 37 * number] ^= 0x55
    path.write_bytes(data)
    first, second = (clip["scores"]["decode_errors"] for clip in split(path, **cut).clips)
    assert first == 0
    assert 1 <= second <= 12
    assert capfd.readouterr().err == ""


def test_a_stream_without_a_whole_frame_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_square(12))
    data = path.read_bytes()
    begin = data.index(b"mdat") + 4
    path.write_bytes(data[:begin] + bytes(len(data) - begin))
    with pytest.raises(VideoError, match=r"decode_error|no_frames"):
        split(path)


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_changed_share_counts_blocks_of_any_plane(plane):
    before = np.full((3, 64, 64), 100, np.uint8)
    after = before.copy()
    after[plane, 16:32, 16:48] = 180
    assert changed_share(before, before) == 0.0
    assert 8 / 64 <= changed_share(before, after) <= 24 / 64


def test_what_lies_close_to_cuts_can_be_trimmed_and_nothing_is_lost(tmp_path):
    path = write_video(tmp_path / "a.mp4", shots([40, 40, 40]), fps=20)
    found = [(clip["start_s"], clip["end_s"]) for clip in split(path, trim_seconds=0.25).clips]
    assert found == [(0, 1.75), (1.75, 2), (2, 2.25), (2.25, 3.75), (3.75, 4), (4, 4.25), (4.25, 6)]
    # More than there is of a shot trims nothing of it.
    assert len(split(path, trim_seconds=1.5).clips) == 5


def test_black_stretches_are_shots_of_their_own(tmp_path):
    bright, black = moving_square(40), still(10, level=0)
    path = write_video(tmp_path / "a.mp4", np.concatenate([black, bright, black, bright, black[:4]]), fps=20)
    uncut = {"detector": "content", "threshold": 255.0, "transitions": False}
    edges = [clip["start_s"] for clip in split(path, **uncut).clips]
    assert edges == [0, 0.5, 2.5, 3]  # the last stretch is too short
    assert len(split(path, dark_seconds=None, **uncut).clips) == 1
    assert len(split(write_video(tmp_path / "b.mp4", still(40, level=0), fps=20)).clips) == 1


@pytest.mark.parametrize(
    ("ours", "theirs"), [(FastContentDetector, ContentDetector), (FastAdaptiveDetector, AdaptiveDetector)]
)
def test_a_frame_scores_what_pyscenedetect_gives_it(ours, theirs):
    one, other = ours(min_scene_len=2), theirs(min_scene_len=2)
    for index, frame in enumerate(shots([8, 12, 10], size=(50, 38))):
        time = FrameTimecode(index, 25.0)
        assert one.process_frame(time, frame) == other.process_frame(time, frame)
        assert one._frame_score == pytest.approx(other._frame_score, abs=1e-9)
    assert one._last_frame is None, "the library's own way was taken"
