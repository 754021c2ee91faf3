import hashlib
import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.errors import UserError
from pipelines.training.checkpoints import (
    LoopState,
    damaged_files,
    find_checkpoints,
    next_attempt,
    prune,
    read_history,
    record_part,
    write_record,
)
from pipelines.training.export import locate
from pipelines.training.output import Output
from pipelines.training.record import History
from pipelines.training.resume import describe_fork, find_beginning
from tests.pipelines.training.runs import step_record, tiny_config

STEP = "step-0000000{}-0123abcd"


def write_checkpoint(storage: Path, name: str, step: int, num_workers: int = 2, after: int = 0) -> Path:
    """As all workers write one, with the part of the record since ``after``."""
    folder = storage / name
    (folder / "engine").mkdir(parents=True)
    state = LoopState(step=step, num_workers=num_workers, identity_hash="x")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    write_record(str(storage), after + 1, [step_record(n).to_line() for n in range(after + 1, step + 1)])
    for rank in range(num_workers):
        part = folder / "engine" / f"part-{rank}"
        part.write_bytes(b"0" * 100)
        entry = {"size": 100, "sha256": hashlib.sha256(b"0" * 100).hexdigest()}
        (folder / f"worker-{rank:05d}.json").write_text(json.dumps({f"engine/{part.name}": entry}))
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


def test_a_checkpoint_of_a_newer_program_is_refused_and_kept(tmp_path):
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"elastic": True}))
    with pytest.raises(UserError, match=r"is a checkpoint of a newer lumos \(its state has elastic\): install"):
        find_checkpoints(str(tmp_path))


def test_a_state_with_a_flipped_byte_is_damage_and_no_newer_program(tmp_path):
    whole = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(2)}", 6)
    for each in (whole, folder):
        data, listed = (each / "state.json").read_bytes(), json.loads((each / "worker-00000.json").read_text())
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (each / "worker-00000.json").write_text(json.dumps(listed | {"state.json": entry}))
    (folder / "state.json").write_bytes(data.replace(b'"step"', b'"stex"'))
    assert [stored.state.step for stored in find_checkpoints(str(tmp_path))] == [3]


def test_the_record_comes_in_parts_however_often_it_began_anew(tmp_path):
    """10, 20, then again from 10 with other intervals; the parts of what was lost stay, and do no harm."""
    for first, step, attempt in ((0, 10, 1), (10, 20, 1), (10, 25, 2), (25, 30, 2)):
        write_checkpoint(tmp_path, f"attempt-0000{attempt}/step-{step:08d}-0123abcd", step, after=first)
    found = {stored.state.step: stored for stored in find_checkpoints(str(tmp_path))}
    for step, after in ((30, 0), (20, 0), (30, 27), (25, 25)):
        records = list(read_history(found[step], after=after))
        assert [record.step for record in records] == list(range(after + 1, step + 1))
    sizes = {step: sum(f.stat().st_size for f in Path(found[step].uri).rglob("*")) for step in found}
    assert max(sizes.values()) - min(sizes.values()) < 10, "a checkpoint does not grow with the steps"
    (tmp_path / "record" / "00000011-00000025.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"no part that ends with step 25, so the record has a gap. Move that checkpoin"
    ):
        list(read_history(found[30]))


def test_a_damaged_part_of_the_record_is_named(tmp_path):
    write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    part = tmp_path / "record" / "00000001-00000003.jsonl"
    lines = part.read_text().splitlines()
    part.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    (found,) = find_checkpoints(str(tmp_path))
    with pytest.raises(UserError, match=r"00000003.jsonl, line 2: not the record .* Move that checkpoint away"):
        list(read_history(found))


def test_an_older_checkpoint_has_its_whole_record_and_only_sizes(tmp_path):
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    (folder / "history.jsonl").write_text("".join(step_record(n).to_line() + "\n" for n in range(1, 4)))
    for rank in range(2):
        (folder / f"worker-{rank:05d}.json").write_text(json.dumps({f"engine/part-{rank}": 100}))
    (tmp_path / "record" / "00000001-00000003.jsonl").unlink()
    (found,) = find_checkpoints(str(tmp_path))
    assert damaged_files(found) == []
    assert [record.step for record in read_history(found, after=1)] == [2, 3]


def test_a_flipped_byte_is_found(tmp_path):
    folder = write_checkpoint(tmp_path, f"attempt-00001/{STEP.format(1)}", 3)
    (found,) = find_checkpoints(str(tmp_path))
    assert damaged_files(found) == []
    (folder / "engine" / "part-1").write_bytes(b"0" * 50 + b"1" + b"0" * 49)
    assert [stored.state.step for stored in find_checkpoints(str(tmp_path))] == [3], "its size is as it was"
    assert damaged_files(found) == ["engine/part-1"]
    with pytest.raises(UserError, match=r"is damaged \(engine/part-1\): name another step"):
        locate(str(folder))


def test_a_run_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read .*: name the folder of a checkpoint instead"):
        locate(f"{tmp_path}@3")


def test_a_fork_begins_where_it_began(tmp_path):
    """Named without a step, the parent's newest checkpoint is another one later on."""
    parent = tmp_path / "parent"
    write_checkpoint(parent, f"attempt-00001/{STEP.format(1)}", 3)
    config = tiny_config(tmp_path, tmp_path / "fork", fork_from=str(parent))
    begun = Output(config, snapshot_digest="d", fork=describe_fork)
    begun.begin(config)
    write_checkpoint(parent, f"attempt-00001/{STEP.format(2)}", 6, after=3)
    again = Output(config, snapshot_digest="d", fork=describe_fork)
    with pytest.raises(UserError, match=r"fork_from = .* is now .*step-00000002.* was another checkpoint"):
        find_beginning(SimpleNamespace(config=config), again)


def test_prune_keeps_what_it_is_told_to(tmp_path):
    for step in range(1, 5):
        write_checkpoint(tmp_path, f"attempt-{step // 3 + 1:05d}/{STEP.format(step)}", step)
    assert next_attempt(str(tmp_path)) == "attempt-00003"
    prune(str(tmp_path), find_checkpoints(str(tmp_path))[:1])
    assert [path.name for path in tmp_path.glob("attempt-*/*")] == [STEP.format(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt-00002", "record"]


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


@pytest.mark.parametrize("steps", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_long_runs_cost_no_more_at_their_end(tmp_path, steps):
    """A run's bookkeeping of so many steps: what a checkpoint adds, and what a driver that begins at its end needs."""
    line, every = step_record(1).to_line(), 500
    added = []
    for last in range(every, steps + 1, every):
        lines = [line.replace('"step": 1,', f'"step": {step},') for step in range(last - every + 1, last + 1)]
        write_record(str(tmp_path), last - every + 1, lines)
        added.append((tmp_path / record_part(last - every + 1, last)).stat().st_size)
    name = f"attempt-00001/step-{steps:08d}-0123abcd"
    folder = write_checkpoint(tmp_path, name, steps, after=steps)
    assert max(added) - min(added) <= every * 6, "digits of the step alone"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1000
    history = History(tmp_path / "metrics.jsonl")
    tracemalloc.start()
    (found,) = find_checkpoints(str(tmp_path))
    history.take_over(read_history(found))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert history.last_step == steps
    assert peak < 8 << 20, "one part at a time is in memory"
