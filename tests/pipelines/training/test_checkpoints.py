import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.training.checkpoints import LoopState, find_checkpoints, next_attempt, prune, read_history
from tests.pipelines.training.runs import step_record

STEP = "step-0000000{}-0123abcd"


def write_checkpoint(storage: Path, name: str, step: int, num_workers: int = 2) -> Path:
    folder = storage / name
    (folder / "engine").mkdir(parents=True)
    state = LoopState(step=step, num_workers=num_workers, identity_hash="x")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder / "history.jsonl").write_text("".join(step_record(n).to_line() + "\n" for n in range(1, step + 1)))
    for rank in range(num_workers):
        part = folder / "engine" / f"part-{rank}"
        part.write_bytes(b"0" * 100)
        (folder / f"worker-{rank:05d}.json").write_text(json.dumps({f"engine/{part.name}": 100}))
    return folder


def test_only_complete_checkpoints_are_found(tmp_path):
    write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 10)
    write_checkpoint(tmp_path, f"attempt-00002/{STEP.format(2)}", 20)
    cut = write_checkpoint(tmp_path, f"attempt-00002/{STEP.format(3)}", 30)
    (cut / "engine" / "part-1").write_bytes(b"0" * 50)
    gone = write_checkpoint(tmp_path, f"attempt-00002/{STEP.format(4)}", 40)
    (gone / "engine" / "part-0").unlink()
    unlisted = write_checkpoint(tmp_path, f"attempt-00002/{STEP.format(5)}", 50)
    (unlisted / "worker-00001.json").unlink()
    half = write_checkpoint(tmp_path, f"attempt-00002/{STEP.format(6)}", 60)
    (half / "state.json").write_text('{"step": 6')
    found = find_checkpoints(str(tmp_path))
    assert [stored.state.step for stored in found] == [20, 10]
    assert len(read_history(found[0])) == 20


def test_a_checkpoint_of_a_newer_program_is_refused_and_kept(tmp_path):
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"elastic": True}))
    with pytest.raises(UserError, match=r"is a checkpoint of a newer lumos \(its state has elastic\): install"):
        find_checkpoints(str(tmp_path))


def test_a_damaged_record_in_a_checkpoint_is_named(tmp_path):
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    lines = (folder / "history.jsonl").read_text().splitlines()
    (folder / "history.jsonl").write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    (found,) = find_checkpoints(str(tmp_path))
    with pytest.raises(UserError, match=r"history.jsonl, line 2: not the record .* Move that checkpoint away"):
        read_history(found)


def test_prune_keeps_what_it_is_told_to(tmp_path):
    for step in range(1, 5):
        write_checkpoint(tmp_path, f"attempt-{step // 3 + 1:05d}/{STEP.format(step)}", step)
    assert next_attempt(str(tmp_path)) == "attempt-00003"
    prune(str(tmp_path), find_checkpoints(str(tmp_path))[:1])
    assert [path.name for path in tmp_path.glob("*/*")] == [STEP.format(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["attempt-00002"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    others = ["data/mine/a.parquet", "attempt-1/x/b", "photos/step-00000001-0123abcd/c", "attempt-00001/notes/d"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(2)}", 20)
    write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 10)
    found = find_checkpoints(str(tmp_path))
    prune(str(tmp_path), found[:1])
    assert all((tmp_path / name).exists() for name in others)
    assert [path.name for path in (tmp_path / "attempt-00001").glob("step-*")] == [kept.name]
    assert next_attempt(str(tmp_path)) == "attempt-00002"


def test_no_storage_yet_means_no_checkpoints(tmp_path):
    storage = str(tmp_path / "none")
    assert find_checkpoints(storage) == []
    assert next_attempt(storage) == "attempt-00001"
    prune(storage, [])
