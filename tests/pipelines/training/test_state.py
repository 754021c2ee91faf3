import json
from dataclasses import asdict
from pathlib import Path

from pipelines.training.state import LoopState, find_checkpoints, next_attempt, prune, read_history


def write_checkpoint(storage: Path, name: str, step: int, num_workers: int = 2) -> Path:
    folder = storage / name
    (folder / "engine").mkdir(parents=True)
    state = LoopState(step=step, num_workers=num_workers, identity_hash="x")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder / "history.jsonl").write_text("line\n" * step)
    for rank in range(num_workers):
        part = folder / "engine" / f"part-{rank}"
        part.write_bytes(b"0" * 100)
        (folder / f"worker-{rank:05d}.json").write_text(json.dumps({f"engine/{part.name}": 100}))
    return folder


def test_only_complete_checkpoints_are_found(tmp_path):
    write_checkpoint(tmp_path, "attempt-00001/step-1", 10)
    write_checkpoint(tmp_path, "attempt-00002/step-2", 20)
    cut = write_checkpoint(tmp_path, "attempt-00002/step-3", 30)
    (cut / "engine" / "part-1").write_bytes(b"0" * 50)
    gone = write_checkpoint(tmp_path, "attempt-00002/step-4", 40)
    (gone / "engine" / "part-0").unlink()
    unlisted = write_checkpoint(tmp_path, "attempt-00002/step-5", 50)
    (unlisted / "worker-00001.json").unlink()
    half = write_checkpoint(tmp_path, "attempt-00002/step-6", 60)
    (half / "state.json").write_text('{"step": 6')
    found = find_checkpoints(str(tmp_path))
    assert [stored.state.step for stored in found] == [20, 10]
    assert len(read_history(found[0])) == 20


def test_prune_keeps_what_it_is_told_to(tmp_path):
    for step in range(1, 5):
        write_checkpoint(tmp_path, f"attempt-{step // 3 + 1:05d}/step-{step}", step)
    assert next_attempt(str(tmp_path)) == "attempt-00003"
    prune(str(tmp_path), find_checkpoints(str(tmp_path))[:1])
    assert [path.name for path in tmp_path.glob("*/*")] == ["step-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["attempt-00002"]


def test_no_storage_yet_means_no_checkpoints(tmp_path):
    storage = str(tmp_path / "none")
    assert find_checkpoints(storage) == []
    assert next_attempt(storage) == "attempt-00001"
    prune(storage, [])
