"""What curation makes of a real film: black bars, cuts, and an opening that two files share."""

from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from scenedetect import AdaptiveDetector, detect

from pipelines.data.scores import Thresholds
from pipelines.data.settings import SplitConfig
from pipelines.data.stage.values import ValueGroup
from pipelines.data.steps.decide import decide
from pipelines.data.steps.duplicates import StoredClips, find_near_duplicates
from pipelines.data.steps.likeness import Limits
from pipelines.data.video.reader import ClipRequest, DecodedSource, read_clip
from pipelines.data.video.shots import split_source

CLIPS = Path(__file__).parent / "clips"
FPS = 24


@cache
def source(name: str) -> DecodedSource:
    return split_source(
        str(CLIPS / f"{name}.mp4"), SplitConfig(dark_seconds=None, transitions=False), beat=lambda: None
    )


def test_the_letterbox_is_found_to_within_two_pixels():
    for name in ("sintel_10s", "sintel_12s_of_30"):
        left, top, width, height = source(name).picture
        assert (left, width) == (0, 854)
        assert abs(top - 58) <= 2
        assert abs(top + height - 1 - 421) <= 2


def test_what_is_encoded_has_no_bars():
    found = source("sintel_10s")
    clip = found.clips[0]
    request = ClipRequest(
        path=str(CLIPS / "sintel_10s.mp4"),
        start_s=clip["start_s"],
        end_s=clip["end_s"],
        fps=12.0,
        num_frames=25,
        width=448,
        height=192,
        picture=found.picture,
        source_frames=found.source_frames,
        origin_s=found.origin_s,
        clean_clock=found.clean_clock,
    )
    frames = read_clip(request, beat=lambda: None)
    rows = np.asarray(frames, dtype=np.float32).mean(axis=(2, 3)).max(axis=0)
    assert rows[:4].min() > 20
    assert rows[-4:].min() > 20


def test_cuts_are_those_of_the_full_size_film():
    seen = 0
    for name in ("sintel_10s", "sintel_12s_of_30"):
        scenes = detect(str(CLIPS / f"{name}.mp4"), AdaptiveDetector(min_scene_len=2))
        expected = [start.frame_num for start, _ in scenes[1:]]
        ours = [round(clip["start_s"] * FPS) for clip in source(name).clips[1:]]
        assert len(ours) == len(expected)
        seen += len(expected)
        assert all(abs(one - other) <= 2 for one, other in zip(ours, expected, strict=True)), (ours, expected)
    assert seen


def test_a_fade_through_black_parts_what_it_joins():
    config = SplitConfig(transitions=False)
    clips = split_source(str(CLIPS / "sintel_10s.mp4"), config, beat=lambda: None).clips
    assert all(one["end_s"] == other["start_s"] for one, other in pairwise(clips))
    assert [clip["scores"]["dark_share"] for clip in clips] == [0, 1, 0, 0]
    [whole, _] = source("sintel_10s").clips
    assert 0.3 < whole["scores"]["dark_share"] < 0.5  # it would be kept, with seconds of black in its middle


def test_no_clip_that_scores_keep_has_a_fade_in_it():
    for name, fade in (("sintel_10s", (74, 170)), ("sintel_12s_of_30", (146, 182))):
        clips = split_source(str(CLIPS / f"{name}.mp4"), SplitConfig(), beat=lambda: None).clips
        assert all(one["end_s"] == other["start_s"] for one, other in pairwise(clips))
        kept = [clip for clip in clips if decide(clip["scores"], Thresholds())[0] == "kept"]
        spans = [(round(clip["start_s"] * FPS), round(clip["end_s"] * FPS)) for clip in kept]
        assert spans
        assert all(end <= fade[0] or begin >= fade[1] for begin, end in spans), spans


def test_what_the_first_measure_does_not_see_the_second_parts_or_has_rejected():
    path, blind = str(CLIPS / "sintel_12s_of_30.mp4"), {"detector": "content", "threshold": 255.0, "dark_seconds": None}
    [whole] = split_source(path, SplitConfig(**blind, transitions=False), beat=lambda: None).clips
    assert decide(whole["scores"], Thresholds()) == ("rejected", "cut 1 > 0.5")
    clips = split_source(path, SplitConfig(**blind), beat=lambda: None).clips
    kept = [clip for clip in clips if decide(clip["scores"], Thresholds())[0] == "kept"]
    spans = [(round(clip["start_s"] * FPS), round(clip["end_s"] * FPS)) for clip in kept]
    for shot in ((8, 66), (88, 142), (256, 284)):  # looked at; between them it dissolves, and fades through black
        assert any(begin <= shot[0] and end >= shot[1] for begin, end in spans), (shot, spans)
    assert not any(begin < change < end for begin, end in spans for change in (74, 170, 248)), spans


def test_the_shared_opening_is_a_near_duplicate():
    clips = [clip for name in ("sintel_10s", "sintel_12s_of_30") for clip in source(name).clips]
    keys = pa.array([f"{index:02d}" for index in range(len(clips))])

    def groups(column, places):
        values = pa.array([clips[place][column] for place in places], pa.binary())
        return [ValueGroup(np.arange(len(places)), lambda: pa.chunked_array([values]))]

    stored = StoredClips(partial(groups, "fingerprint"), partial(groups, "movement"))
    found = find_near_duplicates(keys, stored, Limits(still=0.99, moving=0.9, motion=0.75))
    first_of_the_longer = len(source("sintel_10s").clips)
    assert found[first_of_the_longer].of == 0
    assert found[first_of_the_longer].cosine >= 0.99
    assert 1 not in found, "other shots of one film are not alike"
