"""Files of models, and of DeepSpeed, that a config names in a store."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.data.models.heads import Head
from pipelines.data.models.open_clip import load_open_clip, open_clip_hash
from pipelines.data.models.text_detector import TextDetector
from pipelines.data.settings import DecodeConfig, OpenClipConfig, SplitConfig
from pipelines.data.steps.split import SplitFunction, split_identity
from pipelines.errors import UserError
from pipelines.training.engine import read_deepspeed_file
from tests.pipelines.data.small_models import EMBED, write_head, write_open_clip, write_text_detector


@pytest.fixture
def put(bucket, direct, tmp_path, monkeypatch):
    """Moves a file or folder into the store; gives its URI."""
    monkeypatch.setenv("LUMOS_CACHE", str(tmp_path / "cache"))

    def move(path):
        direct.put(str(path), f"{bucket}/{path.name}", recursive=True)
        return f"{bucket}/{path.name}"

    return move


def test_a_folder_of_open_clip(put, tmp_path):
    here = write_open_clip(tmp_path / "clip")
    there = put(here)
    local, fetched = (OpenClipConfig(weights=str(place)) for place in (here, there))
    assert open_clip_hash(fetched, "features.clip.weights") == open_clip_hash(local, "features.clip.weights")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, expected = (
        load_open_clip(config, "features.clip.weights").model.encode_image(images) for config in (fetched, local)
    )
    assert torch.equal(found, expected)
    with pytest.raises(UserError, match=r"features.clip.weights s3://.*/clip-of-old does not exist; download it"):
        open_clip_hash(OpenClipConfig(weights=f"{there}-of-old"), "features.clip.weights")


def test_heads_and_a_detector_of_text(put, tmp_path):
    features = np.random.default_rng(0).normal(size=(3, EMBED)).astype(np.float32)
    file = write_head(tmp_path / "head.pth", EMBED, 4)
    fetched, local = (Head(str(place), "features.nsfw_head", rectified=True) for place in (put(file), file))
    assert fetched.hash == local.hash
    np.testing.assert_array_equal(fetched(features), local(features))
    detector = write_text_detector(tmp_path / "text.onnx")
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert TextDetector(put(detector)).area(picture) == TextDetector(str(detector)).area(picture)


def test_a_detector_of_shots_is_where_the_child_can_read_it(put, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"w" * 100)
    config = SplitConfig(detector="transnetv2", weights=put(file))
    assert split_identity(config) == split_identity(SplitConfig(detector="transnetv2", weights=str(file)))
    function = SplitFunction(str(tmp_path / "table"), config=config, decode=DecodeConfig())
    assert function.config.weights is not None
    assert Path(function.config.weights).read_bytes() == file.read_bytes()


def test_deepspeed_s_file(put, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    uri = put(file)
    assert read_deepspeed_file(uri) == {"zero_optimization": {"stage": 2}}
    with pytest.raises(UserError, match=r"'s3://.*/none\.json' is neither a JSON file nor a shipped name"):
        read_deepspeed_file(uri.replace("mine", "none"))
