"""Metrics that look through models, on small files of their formats; distances against the formulas."""

import os

import cv2
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from pipelines.errors import UserError
from pipelines.evaluation.distances import cmmd, frechet
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation.metrics import METRICS, Sample
from pipelines.evaluation.models import ModelFiles, Models
from pipelines.evaluation.videos import read_frames
from tests.pipelines.data.small_models import EMBED, write_open_clip
from tests.pipelines.evaluation.folders import FPS, moving, write_generated, write_plain

PROMPTS = ["a red ball", "two cats", "the sea"]


class SmallLpips(torch.nn.Module):
    """Called as NVIDIA's vgg16.pt: features whose squared distance is LPIPS."""

    def forward(self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert return_lpips
        assert not resize_images
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) / 255


class SmallI3d(torch.nn.Module):
    """Called as i3d_torchscript.pt; wants videos [batch, 3, T, H, W] of 0..255 and ten frames or more."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        assert x.shape[1] == 3
        assert x.shape[2] >= 10
        steps = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(dim=(2, 3, 4))
        return torch.cat([x.mean(dim=(2, 3, 4)), steps], dim=1)


def script(path, module):
    torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return ModelFiles(
        clip=str(write_open_clip(root / "clip")),
        lpips=script(root / "lpips.pt", SmallLpips()),
        fvd=script(root / "i3d.pt", SmallI3d()),
    )


@pytest.fixture(scope="module")
def models(files):
    return Models(files)


def test_what_is_measured_keeps_to_the_cores_that_the_process_may_use(files, models, tmp_path, monkeypatch):
    """In a container of few cores' worth of time on a machine of many, torch and OpenCV would take all of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    seen = []
    before = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(
        "pipelines.evaluation.evaluate.read_frames",
        lambda uri: seen.append((torch.get_num_threads(), cv2.getNumThreads())) or read_frames(uri),
    )
    try:
        torch.set_num_threads(8)
        cv2.setNumThreads(8)
        folder = write_plain(tmp_path / "videos", PROMPTS[:1])
        evaluate(EvaluateConfig(folders=(str(folder),), models=files))
        torch.set_num_threads(1)  # a user who chose fewer is left them
        Models(ModelFiles())
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
    assert seen == [(2, 1)] * 2


def test_clip_scores_are_cosines_of_its_own_features(models):
    frames = moving(0)
    sample = Sample(frames, FPS, prompt="a red ball", models=models)
    clip = models._clip
    with torch.inference_mode():
        chosen = [frames[i] for i in (0, 2, 3, 5, 7, 9, 10, 12)]
        images = torch.nn.functional.normalize(clip.model.encode_image(clip.images(chosen)), dim=-1)
        text = torch.nn.functional.normalize(clip.model.encode_text(clip.tokenizer(["a red ball"])), dim=-1)
    assert images.shape == (8, EMBED)
    similarity = METRICS["clip_similarity"].measure(sample)
    assert similarity == pytest.approx(float((images @ text.T).mean()), abs=1e-5)
    cosines = [float(images[i] @ images[i + 1]) for i in range(7)]
    assert METRICS["clip_consistency"].measure(sample) == pytest.approx(np.mean(cosines), abs=1e-5)
    still = Sample(np.repeat(frames[:1], 13, axis=0), FPS, models=models)
    assert METRICS["clip_consistency"].measure(still) == pytest.approx(1)


def test_lpips_is_the_squared_distance_of_features(models):
    one, two = moving(0), moving(5)
    with torch.inference_mode():
        pooled = [
            torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2).float(), 4)
            for x in (one, two)
        ]
    expected = float((((pooled[0] - pooled[1]) / 255) ** 2).sum(dim=(1, 2, 3)).mean())
    measure = METRICS["lpips"].measure
    assert measure(Sample(one, FPS, models=models, reference=two)) == pytest.approx(expected, rel=1e-5)
    assert measure(Sample(one, FPS, models=models, reference=one)) == 0
    assert measure(Sample(one, FPS, models=models)) is None


def test_cmmd_is_the_formula_of_its_paper():
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(n, 16)).astype(np.float32) for n in (30, 20))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    groups = np.repeat(np.arange(6), 5)

    def kernel(a, b):
        return np.mean([[np.exp(-((u - v) ** 2).sum() / 200) for v in b] for u in a], dtype=np.float64)

    statistic = cmmd(x, groups, y)
    counts = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 0, 3, 0]])
    drawn = [x, np.concatenate([x[:5], x[:5], x[10:15], *[x[20:25]] * 3])]
    expected = [1000 * (kernel(z, z) + kernel(y, y) - 2 * kernel(z, y)) for z in drawn]
    assert statistic(counts) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_is_that_of_two_gaussians():
    generator = np.random.default_rng(1)
    x = generator.normal(0, 1, (40, 5)).astype(np.float32)
    y = (generator.normal(1, 2, (60, 5)) @ generator.normal(size=(5, 5))).astype(np.float32)
    groups = np.repeat(np.arange(10), 4)
    counts = np.array([np.ones(10, int), [3, 0, 1, 1, 0, 2, 1, 0, 1, 1]])
    expected = []
    for often in counts:
        rows = np.repeat(x, often[groups], axis=0).astype(np.float64)
        a, b = np.cov(rows.T), np.cov(y.astype(np.float64).T)
        gap = ((rows.mean(0) - y.mean(0, dtype=np.float64)) ** 2).sum()
        expected.append(gap + np.trace(a + b - 2 * sqrtm(a @ b).real))
    assert frechet(x, groups, y)(counts) == pytest.approx(expected, rel=1e-6)
    assert frechet(x, groups, x)(counts[:1]) == pytest.approx([0], abs=1e-6)


def test_sets_are_compared_with_a_reference_folder(files, tmp_path):
    real = write_plain(tmp_path / "real", PROMPTS)
    near = write_generated(tmp_path / "near", PROMPTS, noise=3.0)
    far = write_generated(tmp_path / "far", PROMPTS, noise=40.0)
    result = evaluate(EvaluateConfig(folders=(str(near), str(far)), reference=str(real), models=files))
    near_run, far_run = result.runs
    assert {metric.name for metric in result.metrics} >= {"fvd", "cmmd", "lpips", "psnr", "ssim", "clip_similarity"}
    for name in ("fvd", "cmmd", "lpips"):
        assert 0 <= near_run.figures[name].value < far_run.figures[name].value
        assert near_run.figures[name].interval95[0] < near_run.figures[name].interval95[1]
    assert near_run.figures["psnr"].value > far_run.figures["psnr"].value
    assert set(result.settings["models"]) == {"clip", "lpips", "fvd"}


def test_short_videos_have_no_fvd_and_a_reference_without_any_is_told(files, tmp_path):
    real = write_plain(tmp_path / "real", PROMPTS, frames=5)
    short = write_generated(tmp_path / "short", PROMPTS, frames=5)
    with pytest.raises(UserError, match="has no video that fvd can be told from"):
        evaluate(EvaluateConfig(folders=(str(short),), reference=str(real), models=files))


@pytest.mark.parametrize("name", ["clip", "lpips", "fvd"])
def test_files_that_are_missing_or_none_are_told_with_a_remedy(tmp_path, name):
    with pytest.raises(UserError, match=f"--{name} {tmp_path}/none does not exist; it takes a"):
        Models(ModelFiles(**{name: str(tmp_path / "none")}))
    (tmp_path / "odd.pt").write_bytes(b"no model at all")
    with pytest.raises(UserError, match=f"--{name} {tmp_path}/odd.pt"):
        Models(ModelFiles(**{name: str(tmp_path / "odd.pt")}))


def test_a_module_that_is_called_otherwise_is_told(tmp_path):
    models = Models(
        ModelFiles(fvd=script(tmp_path / "f.pt", SmallLpips()), lpips=script(tmp_path / "l.pt", SmallI3d()))
    )
    with pytest.raises(UserError, match="--fvd: the file cannot be called as expected"):
        models.video_features(moving(0))
    with pytest.raises(UserError, match="--lpips: the file cannot be called as expected"):
        models.lpips(moving(0), moving(1))
