"""Where a model folder may be made of a checkpoint."""

import shutil

import pytest

from lumos.checkpoint import save_checkpoint
from pipelines.errors import UserError
from pipelines.training.checkpoints import LoopState, StoredCheckpoint
from pipelines.training.export import export_to
from tests.lumos.models import VOCABULARY, tiny_model


@pytest.fixture
def stored(tmp_path):
    """As the last checkpoint of an older program, which holds the model itself."""
    save_checkpoint(tmp_path / "checkpoint" / "export", tiny_model(1), VOCABULARY)
    state = LoopState(step=25, num_workers=1, identity_hash="x", exported=True)
    return StoredCheckpoint(str(tmp_path / "checkpoint"), state)


@pytest.mark.parametrize("name", ["export", "export-ema"])
def test_the_model_that_a_run_ended_with_is_not_replaced(stored, tmp_path, monkeypatch, name):
    run = tmp_path / "runs" / "a"
    own = run / name
    save_checkpoint(own, tiny_model(2), VOCABULARY)
    (run / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    before = (own / "model.safetensors").read_bytes()
    for target in (str(own), f"{own}/", name, str(tmp_path / "link" / name)):
        with pytest.raises(UserError, match=r"is the model that the training .*a ended with.*: name another folder"):
            export_to(stored, target)
    assert (own / "model.safetensors").read_bytes() == before

    export_to(stored, str(run / "export-25"))  # of another name
    shutil.rmtree(own)  # as the message says
    export_to(stored, str(own))
    assert (own / "model.safetensors").read_bytes() == (run / "export-25" / "model.safetensors").read_bytes() != before


def test_a_model_of_no_run_is_replaced(stored, tmp_path):
    save_checkpoint(tmp_path / "models" / "export", tiny_model(2), VOCABULARY)
    export_to(stored, str(tmp_path / "models" / "export"))
    (made,) = (tmp_path / "checkpoint" / "export").glob("*.safetensors")
    assert (tmp_path / "models" / "export" / made.name).read_bytes() == made.read_bytes()
