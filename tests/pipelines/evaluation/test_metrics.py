"""Metrics against values computed here in another way, or known from how the pictures were made."""

import itertools
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from pipelines import sample_corpus as corpus
from pipelines.evaluation import judge
from pipelines.evaluation.metrics import METRICS, Sample, metrics_for
from pipelines.evaluation.videos import read_frames
from pipelines.media import encode_video, ssim
from tests.pipelines.evaluation.folders import FPS, moving


def measured(name: str, frames: np.ndarray, **more: object) -> float | None:
    measure = METRICS[name].measure
    assert measure is not None
    return measure(Sample(frames, FPS, **more))


def test_temporal_flickering_is_vbench_s(tmp_path):
    frames = moving(0, noise=10)
    total = sum(
        abs(int(a) - int(b))
        for one, two in itertools.pairwise(frames)
        for a, b in zip(one.flat, two.flat, strict=False)
    )
    mean = Fraction(total, frames[0].size * (len(frames) - 1))
    assert measured("temporal_flickering", frames) == pytest.approx(float((255 - mean) / 255), abs=1e-7)
    # Of a file, to the bit: with the pixels that OpenCV gives, and in single precision.
    (tmp_path / "a ball-0.mp4").write_bytes(encode_video(frames, FPS))
    video = cv2.VideoCapture(str(tmp_path / "a ball-0.mp4"))
    seen = []
    while (answer := video.read())[0]:
        seen.append(answer[1].astype(np.float32))
    assert len(seen) == len(frames)
    steps = np.array([np.abs(a - b).mean() for a, b in itertools.pairwise(seen)])
    assert steps.dtype == np.float32
    expected = (255.0 - np.mean(steps).item()) / 255.0
    assert measured("temporal_flickering", read_frames(str(tmp_path / "a ball-0.mp4"))[0]) == expected


def test_a_still_video_does_not_move_and_a_moving_one_does():
    still, moves = np.repeat(moving(0)[:1], 13, axis=0), moving(0)
    assert measured("motion", still) == 0
    assert measured("static_share", still) == 1
    assert measured("temporal_flickering", still) == 1
    assert measured("frame_consistency", still) == pytest.approx(1)
    assert 0 < measured("motion", moves) < 0.5
    assert measured("static_share", moves) == 0
    assert measured("frame_consistency", moves) < 0.99


def test_motion_of_part_of_the_time():
    frames = np.concatenate([np.repeat(moving(0)[:1], 13, axis=0), moving(0)])
    assert 0.4 < measured("static_share", frames) < 0.6


def test_sharpness_falls_with_blur_and_is_the_laplacian_s_variance():
    frames = moving(3, noise=20)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in frames])
    assert measured("sharpness", blurred) < 0.2 * measured("sharpness", frames)
    luma = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]).astype(np.int64)
    padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    edges = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:] - 4 * luma
    assert measured("sharpness", frames) == pytest.approx(edges.var(axis=(1, 2)).mean(), rel=1e-6)


def test_ssim_by_the_definition():
    one, two = moving(0, noise=15)[0], moving(1, noise=15)[0]
    x, y = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (one, two))
    offsets = np.arange(11) - 5
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    px, py = (np.pad(image, 5, mode="symmetric") for image in (x, y))
    values = []
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            a, b = px[row : row + 11, column : column + 11], py[row : row + 11, column : column + 11]
            ma, mb = (kernel * a).sum(), (kernel * b).sum()
            va, vb, cov = (
                (kernel * (u - mu) * (v - mv)).sum()
                for u, mu, v, mv in ((a, ma, a, ma), (b, mb, b, mb), (a, ma, b, mb))
            )
            c1, c2 = 6.5025, 58.5225
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(one, two) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(one, one) == pytest.approx(1)


def test_pictures_have_no_figures_of_time():
    picture = moving(0)[:1]
    for name in ("temporal_flickering", "motion", "static_share", "frame_consistency"):
        assert measured(name, picture) is None
    assert measured("sharpness", picture) > 0


def test_the_judge_scores_the_demo_s_prompts_alone(tmp_path):
    spec = corpus.sample_specs(0, 1)[0]
    corpus.write_video(tmp_path / "clip.mp4", corpus.render_clip(spec))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    other = next(s for s in corpus.sample_specs(0, 60) if s.color != spec.color and s.background == spec.background)
    assert measured("judge_all", frames, prompt=spec.caption) == 1
    assert measured("judge_color", frames, prompt=other.caption) == 0
    assert measured("judge_background", frames, prompt=other.caption) == 1
    assert measured("judge_strict", frames, prompt=spec.caption) == 1
    assert measured("judge_constancy", frames, prompt=spec.caption) == 1
    assert measured("judge_all", frames, prompt="a cat on a sofa") is None


def test_pairs_compare_with_their_reference():
    frames = moving(0, noise=5)
    near, far = moving(0, noise=9), moving(4, speed=3)
    assert measured("psnr", frames, reference=frames) == 99
    error = np.mean((frames.astype(float) - near) ** 2)
    assert measured("psnr", frames, reference=near) == pytest.approx(10 * np.log10(255**2 / error), rel=1e-5)
    assert measured("ssim", frames, reference=near) > measured("ssim", frames, reference=far)
    with pytest.raises(ValueError, match="48x48, its reference 32x32 px"):
        measured("psnr", frames, reference=moving(0, side=32))


def test_the_table_s_lines_are_whole():
    for metric in METRICS.values():
        assert (metric.measure is None) == (metric.distance is not None) == (metric.features is not None), metric.name
        assert metric.low is None or metric.high is None or metric.low < metric.high, metric.name
    alone = {metric.name for metric in metrics_for(given=set(), reference=False)}
    assert {"temporal_flickering", "motion", "judge_all"} <= alone
    assert not alone & {"psnr", "clip_similarity", "cmmd", "fvd", "lpips"}
    assert {m.name for m in metrics_for(given={"clip", "lpips", "fvd"}, reference=True)} == set(METRICS)


def test_the_table_has_every_figure_of_the_judge():
    reading = judge.asked_for(corpus.sample_specs(0, 1)[0].caption)
    known = {name.removeprefix("judge_") for name, metric in METRICS.items() if metric.by == "judge"}
    assert known == set(judge.score([reading], [reading]).accuracy)
