"""Where checkpoints are made, and what keeps two drivers from one storage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from pipelines.training.config import CheckpointConfig
from pipelines.training.engine_files import EngineFiles
from pipelines.training.output import Output
from pipelines.training.resume import held
from pipelines.training.scratch import Scratch
from tests.pipelines.training.runs import tiny_config


def test_a_killed_process_leaves_its_scratch_to_the_next_one(tmp_path: Path):
    code = f"from pipelines.training.scratch import Scratch; s = Scratch({str(tmp_path)!r}); "
    code += "(s.folder / 'step').write_text('x'); import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = tmp_path.glob("lumos-scratch-*")
    first = Scratch(str(tmp_path))
    assert not left.exists()
    second = Scratch(str(tmp_path))  # leaves alone what lives
    assert first.folder.exists()
    for each in (first, second):
        each.remove()
    assert list(tmp_path.glob("lumos-scratch-*")) == []


def test_a_scratch_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint.scratch = .*/file cannot be used .*every node can write to"):
        Scratch(str(tmp_path / "file"))


def test_two_users_share_a_folder_for_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As /tmp is: no file of one is opened by the other, who might not."""
    ours = Scratch(str(tmp_path))
    of_ours = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    opened: list[str] = []
    monkeypatch.setattr(os, "open", lambda path, *more, was=os.open: opened.append(str(path)) or was(path, *more))
    theirs = Scratch(str(tmp_path))
    monkeypatch.undo()
    names = {Path(path).relative_to(tmp_path).parts[0] for path in opened if Path(path).is_relative_to(tmp_path)}
    assert names, "the lock is opened by another function now"
    assert not names & of_ours
    theirs.remove()
    ours.remove()


@pytest.mark.parametrize("name", ["elsewhere", "run-checkpoints"])  # the second begins as the output does
def test_the_storage_of_checkpoints_is_locked_too(tmp_path: Path, name):
    options = CheckpointConfig(storage=str(tmp_path / name))
    one, other = (
        Output(tiny_config(tmp_path, tmp_path / output, checkpoint=options), snapshot_digest="d")
        for output in ("run", "copy")
    )
    assert one.storage == other.storage
    refused = pytest.raises(UserError, match=r"checkpoint.storage .* is in use by another run")
    with held(one), refused, held(other):
        pass


def test_the_count_of_steps_of_an_older_head_is_that_of_both_parts(tmp_path: Path):
    """Older programs had the head whole in the optimizer; without the count, AdamW fails at its next update."""
    names = ["decoder.norm", "decoder.lm_head.weight"]
    tensors = [torch.ones(2), torch.arange(8.0).view(4, 2)]
    state = {i: {"exp_avg": x, "exp_avg_sq": x, "step": torch.tensor(7.0)} for i, x in enumerate(tensors)}
    model = {"module": dict(zip(names, tensors, strict=True)), "optimizer": {"state": state, "param_groups": []}}
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    files = EngineFiles(tmp_path, order=names)
    files.split_head(1)
    assert files.scalar("decoder.lm_head.visual", "step") == 7
    assert torch.equal(files.read("decoder.lm_head.visual", "exp_avg"), tensors[1][1:])
