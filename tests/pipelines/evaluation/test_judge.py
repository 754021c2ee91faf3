"""The judge reads real clips of the corpus right, whatever the seed, and shuffled captions only by chance."""

import av
import numpy as np
import pytest

from pipelines import sample_corpus as corpus
from pipelines.evaluation import judge
from pipelines.evaluation.judge import Reading


def prompted(spec: corpus.ClipSpec) -> Reading:
    return Reading(color=spec.color, background=spec.background, shape=spec.shape, direction=spec.direction)


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
    return videos, [prompted(spec) for spec in specs]


@pytest.fixture(scope="module")
def readings(clips: tuple[list[np.ndarray], list[Reading]]) -> list[Reading]:
    return [judge.judge_video(video) for video in clips[0]]


def test_judge_reads_real_clips(clips: tuple[list[np.ndarray], list[Reading]], readings: list[Reading]):
    result = judge.score(readings, clips[1])
    assert result.samples == 224
    for name in judge.ATTRIBUTES:
        assert result.accuracy[name] >= 0.99, name


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
    for name, kinds in (("color", 6), ("background", 4), ("shape", 4), ("direction", 4)):
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
        assert judge.judge_video(corpus.render_clip(spec)) == prompted(spec)


def test_judge_says_none_where_there_is_nothing():
    spec = corpus.held_out_specs(0)[0]
    still = halved(corpus.render_clip(spec, step=0))
    assert judge.judge_video(still).direction == "none"
    assert judge.judge_video(still).shape == spec.shape
    empty = np.full((13, corpus.SIDE, corpus.SIDE, 3), corpus.BACKGROUNDS["brown"], np.uint8)
    assert judge.judge_video(empty) == Reading(color="none", background="brown", shape="none", direction="none")


def test_judge_never_fails_on_noise():
    generator = np.random.default_rng(0)
    for shape in ((13, 48, 48, 3), (1, 48, 48, 3), (5, 32, 64, 3)):
        reading = judge.judge_video(generator.integers(0, 256, shape, dtype=np.uint8))
        assert reading.background in corpus.BACKGROUNDS


def test_judge_rejects_arrays_that_are_not_videos():
    with pytest.raises(ValueError, match=r"uint8 frames \[T, H, W, 3\], got float32 \[2, 8, 8, 3\]"):
        judge.judge_video(np.zeros((2, 8, 8, 3), dtype=np.float32))


def test_score_counts_each_attribute_and_all():
    asked = Reading(color="red", background="dark", shape="diagonal", direction="up")
    wrong = Reading(color="red", background="dark", shape="square", direction="up")
    result = judge.score([asked, wrong], [asked, asked])
    assert result.accuracy == {"color": 1.0, "background": 1.0, "shape": 0.5, "direction": 1.0, "all": 0.5}
    with pytest.raises(ValueError, match="1 readings for 2 prompts"):
        judge.score([asked], [asked, asked])


def test_a_caption_of_the_corpus_says_what_it_asks_for():
    for spec in corpus.sample_specs(3, 40):
        assert judge.asked_for(spec.caption) == prompted(spec)
    assert judge.asked_for("A red square in front of the sea.") is None
