"""The judge reads real clips of the corpus right, whatever the seed, and shuffled captions only by chance."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from lumos.config import TokenizerConfig
from lumos.tokenizers import load_video_tokenizer
from pipelines import sample_corpus as corpus
from pipelines.evaluation import judge
from pipelines.evaluation.judge import Reading


def halved(frames: np.ndarray) -> np.ndarray:
    """48x48 px, as curation makes them."""
    blocks = frames.reshape(len(frames), 48, 2, 48, 2, 3).astype(np.float32)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[np.ndarray], list[Reading]]:
    """Clips of training and of held-out combinations, after a real H.264 round trip, at 48x48."""
    root = tmp_path_factory.mktemp("clips")
    videos, specs = [], corpus.sample_specs(5, 160) + corpus.held_out_specs(5)
    for spec in specs:
        corpus.write_video(root / "clip.mp4", corpus.render_clip(spec))
        with av.open(str(root / "clip.mp4")) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        videos.append(halved(frames))
    return videos, [judge.asked_for_by(spec) for spec in specs]


@pytest.fixture(scope="module")
def readings(clips: tuple[list[np.ndarray], list[Reading]]) -> list[Reading]:
    return [judge.judge_video(video) for video in clips[0]]


def test_judge_reads_real_clips(clips: tuple[list[np.ndarray], list[Reading]], readings: list[Reading]):
    result = judge.score(readings, clips[1])
    assert result.samples == 224
    for name in (*judge.ATTRIBUTES, "all", "strict", "shape_frames", "constancy"):
        assert result.accuracy[name] >= 0.99, name
    assert result.area_change < 0.02


def test_judge_reads_what_the_tokenizer_makes_of_real_clips(clips: tuple[list[np.ndarray], list[Reading]]):
    tokenizer = load_video_tokenizer(TokenizerConfig())
    videos, asked = (column[::3] for column in clips)
    again = tokenizer.decode(tokenizer.encode(torch.from_numpy(np.stack(videos)))).numpy()
    result = judge.score([judge.judge_video(video) for video in again], asked)
    for name, share in result.accuracy.items():
        assert share >= (0.95 if name == "constancy" else 0.98), (name, share)
    assert result.area_change < 0.03


def test_judge_is_at_chance_on_shuffled_captions(
    clips: tuple[list[np.ndarray], list[Reading]], readings: list[Reading]
):
    generator = np.random.default_rng(0)
    totals = dict.fromkeys(judge.ATTRIBUTES, 0.0)
    for _ in range(50):
        shuffled = [clips[1][index] for index in generator.permutation(len(readings))]
        result = judge.score(readings, shuffled)
        for name in judge.ATTRIBUTES:
            totals[name] += result.accuracy[name] / 50
    for name, kinds in (("color", 6), ("background", 4), ("shape", 4), ("direction", 4), ("size", 2)):
        assert totals[name] == pytest.approx(1 / kinds, abs=0.02)
        assert result.chance[name] == pytest.approx(totals[name], abs=0.01)  # the exact mean over all shuffles


def test_judge_survives_blur_and_noise(clips: tuple[list[np.ndarray], list[Reading]]):
    generator = np.random.default_rng(0)
    readings = []
    for video in clips[0][:64]:
        blurred = video.astype(np.float32)
        for axis in (1, 2):
            for _ in range(3):
                padded = np.concatenate([blurred.take([0], axis), blurred, blurred.take([-1], axis)], axis=axis)
                count = blurred.shape[axis]
                blurred = sum(padded.take(range(shift, shift + count), axis) for shift in range(3)) / 3
        noisy = np.clip(blurred + generator.normal(0, 12, blurred.shape), 0, 255).astype(np.uint8)
        readings.append(judge.judge_video(noisy))
    result = judge.score(readings, clips[1][:64])
    for name in judge.ATTRIBUTES:
        assert result.accuracy[name] >= 0.95, name


def test_judge_reads_other_sizes():
    for spec in corpus.held_out_specs(1)[:16]:
        assert judge.judge_video(corpus.render_clip(spec)) == judge.asked_for_by(spec)


def test_judge_says_none_where_there_is_nothing():
    spec = corpus.held_out_specs(0)[0]
    still = halved(corpus.render_clip(spec, step=0))
    assert judge.judge_video(still).direction == "none"
    assert judge.judge_video(still).shape == spec.shape
    empty = np.full((13, corpus.SIDE, corpus.SIDE, 3), corpus.BACKGROUNDS["brown"], np.uint8)
    nothing = judge.judge_video(empty)
    assert nothing == Reading(color="none", background="brown", shape="none", direction="none", size="none")
    assert not nothing.is_constant
    assert judge.score([nothing], [judge.asked_for_by(spec)]).accuracy["shape_frames"] == 0


def shown(frame_shapes: list[str], sizes: list[str]) -> np.ndarray:
    """A clip whose subject has a shape and a size of its own in each frame, [13, 48, 48, 3]."""
    base = corpus.ClipSpec(
        shape="square", size="large", color="red", background="gray", direction="right", top=16, left=0
    )
    frames = [
        corpus.render_clip(replace(base, shape=shape, size=size))[index]
        for index, (shape, size) in enumerate(zip(frame_shapes, sizes, strict=True))
    ]
    return halved(np.stack(frames))


ASKED = Reading(color="red", background="gray", shape="bar", direction="right", size="large")


def test_strict_asks_for_the_shape_in_three_quarters_of_the_frames():
    for wrong in (3, 4):
        seen = judge.judge_video(shown(["bar"] * (13 - wrong) + ["square"] * wrong, ["large"] * 13))
        assert seen.frame_shapes == ("bar",) * (13 - wrong) + ("square",) * wrong
        result = judge.score([seen], [ASKED])
        assert result.accuracy["shape_frames"] == pytest.approx((13 - wrong) / 13)
        assert result.accuracy["strict"] == (1.0 if wrong == 3 else 0.0)
        assert (result.accuracy["shape"], result.accuracy["all"]) == (1.0, 1.0)
        assert result.accuracy["constancy"] == 0.0
        assert result.area_change > 0.3


def test_a_shape_that_flickers_is_no_shape_throughout():
    seen = judge.judge_video(shown([("bar", "square")[index % 2] for index in range(13)], ["large"] * 13))
    assert seen.steady_shape == "none"
    assert judge.score([seen], [ASKED]).accuracy["strict"] == 0.0


def test_the_wrong_size_is_seen_and_counts():
    seen = judge.judge_video(shown(["bar"] * 13, ["small"] * 13))
    assert seen.size == "small"
    accuracy = judge.score([seen], [ASKED]).accuracy
    assert (accuracy["size"], accuracy["strict"], accuracy["all"]) == (0.0, 0.0, 1.0)


def test_a_subject_that_lacks_a_cell_has_no_shape():
    whole = shown(["square"] * 13, ["small"] * 13)
    background = np.array(corpus.BACKGROUNDS["gray"], dtype=np.uint8)
    for index, frame in enumerate(whole):
        assert judge.judge_video(whole).frame_shapes[index] == "square"
        frame[8:16, 2 * index : 2 * index + 8] = background  # the cell at the top left of its four
    seen = judge.judge_video(whole)
    assert seen.frame_shapes == ("none",) * 13
    assert seen.steady_shape == "none"


def test_constancy_is_of_the_area_and_not_of_the_place():
    steady = judge.judge_video(shown(["bar"] * 13, ["large"] * 13))
    assert steady.is_constant
    growing = judge.judge_video(shown(["bar"] * 13, ["small"] * 6 + ["large"] * 7))
    assert growing.frame_shapes == ("bar",) * 13
    assert not growing.is_constant


def test_judge_never_fails_on_noise():
    generator = np.random.default_rng(0)
    for shape in ((13, 48, 48, 3), (1, 48, 48, 3), (5, 32, 64, 3)):
        reading = judge.judge_video(generator.integers(0, 256, shape, dtype=np.uint8))
        assert reading.background in corpus.BACKGROUNDS


def test_judge_rejects_arrays_that_are_not_videos():
    with pytest.raises(ValueError, match=r"uint8 frames \[T, H, W, 3\], got float32 \[2, 8, 8, 3\]"):
        judge.judge_video(np.zeros((2, 8, 8, 3), dtype=np.float32))


def test_score_counts_each_attribute_and_all():
    asked = Reading(color="red", background="dark", shape="diagonal", direction="up", size="small")
    seen = replace(asked, frame_shapes=("diagonal",) * 13)
    wrong = replace(asked, shape="square", frame_shapes=("square",) * 13)
    result = judge.score([seen, wrong], [asked, asked])
    right = dict.fromkeys(("color", "background", "direction", "size", "constancy"), 1.0)
    assert result.accuracy == right | dict.fromkeys(("shape", "all", "strict", "shape_frames"), 0.5)
    assert result.accuracy.keys() == result.chance.keys() == result.interval95.keys()
    with pytest.raises(ValueError, match="1 readings for 2 prompts"):
        judge.score([asked], [asked, asked])


def test_a_caption_of_the_corpus_says_what_it_asks_for():
    for spec in corpus.sample_specs(3, 40):
        assert judge.asked_for(spec.caption) == judge.asked_for_by(spec)
    assert judge.asked_for("A red square in front of the sea.") is None
