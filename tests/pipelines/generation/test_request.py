from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lumos.compression import VideoSize
from lumos.config import SamplingConfig
from lumos.encoder import RequestEncoder
from lumos.folder import open_folder
from pipelines.config import config_hash
from pipelines.generation.request import VideoRequest, file_name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red square moves left", "a-red-square-moves-left-7.mp4"),
        ("../../etc/passwd", "etc-passwd-7.mp4"),
        ("Ein Würfel fällt!", "ein-wurfel-fallt-7.mp4"),
        ("正方形が動く", "video-7.mp4"),
        ("con\x00trol\nand | pipes", "con-trol-and-pipes-7.mp4"),
        ("", "video-7.mp4"),
    ],
)
def test_names_are_safe_for_any_prompt(prompt: str, name: str) -> None:
    assert file_name(prompt, 7, "mp4") == name


def test_names_of_long_prompts_stay_short_and_differ_by_seed() -> None:
    names = {file_name("word " * 500, seed, "mp4") for seed in (0, 2**63 - 1)}
    assert len(names) == 2
    assert max(map(len, names)) < 120


def test_how_much_is_to_move_is_asked_of_a_model_that_knows_it(model_dir: Path, tokenizer_path: Path) -> None:
    folder = open_folder(model_dir, tokenizer=tokenizer_path)
    knowing = RequestEncoder(replace(folder, info=replace(folder.info, motion_prefix=True)))
    size = knowing.size()
    plain = VideoRequest(prompt="a red square", seed=0, size=size, sampling=SamplingConfig())
    moving = replace(plain, motion=4)
    written = replace(plain, prompt="motion 4: a red square")
    assert moving.encode(knowing).text_ids == written.encode(knowing).text_ids
    assert plain.config_hash({}) == written.config_hash({}) != moving.config_hash({})
    for encoder, asked, message in (
        (RequestEncoder(folder), moving, "motion 4 asked of the model .*: it was trained without; leave motion out"),
        (knowing, replace(plain, motion=10), r"motion 10 is outside 0\.\.9"),
        (knowing, replace(moving, size=replace(size, num_frames=1)), "is of videos, num_frames is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            asked.encode(encoder)


def test_settings_added_later_name_the_requests_of_before_as_before() -> None:
    size = VideoSize(width=32, height=32, num_frames=13, fps=12.0)
    plain = VideoRequest(prompt="a red square", seed=0, size=size, sampling=SamplingConfig())
    first = {"num_steps": 50, "guidance_scale": 15.0, "history_ratio": 0.7, "temperature": 1.0}
    first |= {"release_temperature": False, "release_given_frames": False}
    assert plain.config_hash({}) == config_hash({"model": {}, "size": asdict(size), "sampling": first, "format": "mp4"})
    assert plain.config_hash({}) != replace(plain, sampling=SamplingConfig(draw_temperature=0.7)).config_hash({})


def test_given_frames_are_part_of_what_a_request_is() -> None:
    size = VideoSize(width=32, height=32, num_frames=13, fps=12.0)
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    plain = VideoRequest(prompt="a red square", seed=0, size=size, sampling=SamplingConfig())
    image, clip = replace(plain, given=frames[:1]), replace(plain, given=frames)
    assert len({request.config_hash({}) for request in (plain, image, clip, replace(clip, given=255 - frames))}) == 4
    assert replace(plain, given=frames.copy()) == clip != image
    assert len({request.kind for request in (plain, image, clip, replace(clip, given=255 - frames))}) == 3
    assert plain.config_hash({}) == replace(clip, given=None).config_hash({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 32, 40, 3), np.uint8), r"must be uint8 \['T', 32, 32, 3\], got uint8 \[1, 32, 40, 3\]"),
        (np.zeros((1, 32, 32, 3), np.float32), "got float32"),
        (np.zeros((4, 32, 32, 3), np.uint8), r"num_frames 4 is not 1 \+ 4k"),
        (np.zeros((13, 32, 32, 3), np.uint8), "13 frames are given and num_frames is 13: set num_frames to 17 or more"),
    ],
)
def test_frames_that_begin_no_such_video_are_named(given: np.ndarray, message: str) -> None:
    size = VideoSize(width=32, height=32, num_frames=13, fps=12.0)
    with pytest.raises(ValueError, match=message):
        VideoRequest(prompt="x", seed=0, size=size, sampling=SamplingConfig(), given=given)
