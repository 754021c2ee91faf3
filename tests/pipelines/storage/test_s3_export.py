"""Models that are written over others in S3."""

import pytest
import torch

from lumos.checkpoint import load_checkpoint, save_checkpoint
from pipelines.errors import UserError
from pipelines.training import export as export_module
from pipelines.training.export import export_to
from pipelines.training.mirror import Mirror
from tests.lumos.models import VOCABULARY, tiny_model

SMALL, LARGE = 50_000, 1_000_000_000  # bytes of a file: several with an index, or one


def write(folder, seed, shard_bytes):
    save_checkpoint(folder, tiny_model(seed), VOCABULARY, max_shard_bytes=shard_bytes)


def check_model(direct, uri, tmp_path, seed):
    """What is there is the model of a seed, and nothing of another."""
    folder = tmp_path / f"fetched-{seed}"
    direct.get(f"{uri}/", str(folder), recursive=True)
    model, expected = load_checkpoint(folder).model, tiny_model(seed)
    for (name, weight), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(weight, wanted), name
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def exported(monkeypatch):
    """Has ``export_to`` write the model of the seed and file size that stand for a checkpoint."""

    def export(stored, target, **_):
        write(target, *stored)

    monkeypatch.setattr(export_module, "export", export)


def test_a_model_in_one_file_replaces_one_in_several(bucket, direct, tmp_path, exported):
    uri = f"{bucket}/model"
    export_to((1, SMALL), uri)
    assert "model.safetensors.index.json" in check_model(direct, uri, tmp_path, 1)
    export_to((2, LARGE), uri)
    assert check_model(direct, uri, tmp_path, 2) == {"config.json", "model.safetensors"}


def test_a_run_s_model_in_one_file_replaces_one_in_several(bucket, direct, tmp_path):
    uri = f"{bucket}/run"
    for seed, shard_bytes in ((1, SMALL), (2, LARGE)):  # by a driver each
        mirror = Mirror(uri)
        write(mirror.folder / "export", seed, shard_bytes)
        mirror.push()
    assert check_model(direct, f"{uri}/export", tmp_path, 2) == {"config.json", "model.safetensors"}


def test_a_run_s_model_is_not_replaced_by_an_export(bucket, direct, tmp_path, exported):
    uri = f"{bucket}/trained"
    mirror = Mirror(uri)
    write(mirror.folder / "export", 1, LARGE)
    (mirror.folder / "run.json").write_text("{}")
    mirror.push()
    for target in (f"{uri}/export", f"{uri}/export/"):
        with pytest.raises(UserError, match=r"is the model that the training s3://.*/trained ended with"):
            export_to((2, LARGE), target)
    check_model(direct, f"{uri}/export", tmp_path, 1)
    export_to((2, LARGE), f"{uri}/export-25")
    check_model(direct, f"{uri}/export-25", tmp_path, 2)


def test_an_export_that_was_cut_off_is_made_by_the_same_command(bucket, direct, tmp_path, exported):
    uri = f"{bucket}/model"
    export_to((1, SMALL), uri)
    direct.rm_file(f"{uri}/config.json")  # written last
    export_to((2, LARGE), uri)
    check_model(direct, uri, tmp_path, 2)
    direct.pipe_file(f"{bucket}/other/video.mp4", b"")
    with pytest.raises(UserError, match="holds files that are not a checkpoint"):
        export_to((2, LARGE), f"{bucket}/other")
