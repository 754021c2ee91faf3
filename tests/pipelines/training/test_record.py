import json
import os
import subprocess
import sys
import threading
from dataclasses import MISSING, dataclass, fields, replace

import pytest

from pipelines.errors import UserError
from pipelines.training import record as record_module
from pipelines.training.record import History, Recorder, StepRecord, event, open_queue
from tests.pipelines.training.runs import step_record as record
from tests.pipelines.training.runs import wait_until

# What every line of `metrics.jsonl` has had from the first program on.
FIRST_FIELDS = {
    "step", "time", "loss", "frame_losses", "lr", "grad_norm", "tokens", "tokens_per_s", "step_seconds", "data_wait",
    "masked_share", "masked_tokens", "epoch",
}  # fmt: skip


def test_history_records_a_replayed_step_once(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    assert len(history.add([record(1), record(2), record(3)])) == 3
    assert [new.step for new in history.add([record(2, loss=9.0), record(3), record(4)])] == [4]
    assert [kept.loss for kept in History(history.path).read()] == [1.0] * 4
    assert History(history.path).last_step == 4


def test_history_drops_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    History(path).add([record(1), record(2)])
    path.write_text(path.read_text() + record(3).to_line()[:40])
    history = History(path)
    assert history.last_step == 2
    history.add([record(3)])
    assert [kept.step for kept in History(path).read()] == [1, 2, 3]


def test_every_field_added_later_has_a_default():
    without = {field.name for field in fields(StepRecord) if field.default is field.default_factory is MISSING}
    assert without == FIRST_FIELDS


def newer_lines(count: int) -> list[str]:
    known = [json.loads(record(step).to_line()) for step in range(1, count + 1)]
    return [json.dumps(line | {"z_loss": line["step"] / 8, "note": ["ä", None]}) for line in known]


def test_a_record_of_a_newer_program_is_read_whole_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in newer_lines(3)))
    history = History(path)
    records = list(history.read())
    assert [kept.step for kept in records] == [1, 2, 3]
    assert records[2].unknown == {"z_loss": 3 / 8, "note": ["ä", None]}
    history.add([record(4)])
    assert path.read_text().splitlines() == [*newer_lines(3), record(4).to_line()]
    copy = History(tmp_path / "copy.jsonl")  # as the record that a checkpoint carries is taken over
    copy.take_over(History(path).read())
    assert copy.path.read_text() == path.read_text()


def test_a_record_of_an_older_program_is_read_with_defaults(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class NewerRecord(StepRecord):
        z_loss: float = -1.0

    path = tmp_path / "metrics.jsonl"
    History(path).add([record(1), record(2)])
    older = path.read_text()
    monkeypatch.setattr(record_module, "StepRecord", NewerRecord)
    history = History(path)
    assert [(kept.step, kept.z_loss) for kept in history.read()] == [(1, -1.0), (2, -1.0)]
    assert path.read_text() == older


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(newer_lines(3)))
    History(path).add([record(4)])
    assert path.read_text().splitlines() == [*newer_lines(3), record(4).to_line()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (record(2).to_line()[:40], 'not the record of a step: .*"step": 2'),
        ("", "not the record of a step"),
        ("\udcff", "not the record of a step"),
        ('{"step": 2}', "not the record of a step"),
        ("[2]", "not the record of a step"),
        (record(3).to_line(), "the record of step 3, not of step 2"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_rewritten(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    for lines in ([record(1).to_line(), line, record(3).to_line(), ""], [record(1).to_line(), line, ""]):
        content = "\n".join(lines).encode(errors="surrogateescape")
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"metrics.jsonl, line 2: {message}.* Mend the line, or move the file"):
            History(path)
        assert path.read_bytes() == content
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_zeros_that_a_crash_left_at_the_end_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    History(path).add([record(1)])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    assert History(path).last_step == 1
    assert path.read_bytes() == whole


def test_history_refuses_a_gap(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="ends at step 0; the record of step 2 leaves a gap"):
        history.add([record(2)])


def test_fields_at_their_defaults_are_left_out_of_a_line():
    assert json.loads(record(1).to_line()).keys() == FIRST_FIELDS
    validated = replace(record(1), val_loss=2.5, val_frame_losses=(2.0, 3.0), phases={"forward": 0.5}, skipped=1)
    assert StepRecord.from_line(validated.to_line()) == validated
    assert json.loads(validated.to_line())["val_frame_losses"] == [2.0, 3.0]


def test_records_are_read_from_any_step_on_while_others_are_added(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.take_over(record(step) for step in range(1, 2501))
    assert [kept.step for kept in history.read(after=2498)] == [2499, 2500]
    reading = history.read(after=1000)
    assert next(reading).step == 1001
    history.add([record(2501)])
    assert [kept.step for kept in history.read(after=2500)] == [2501]
    assert [kept.step for kept in history.read(after=3)][:2] == [4, 5]
    assert list(history.read(after=2501)) == []


# Opens and continues a record of 200,000 steps, and says by how many MB its memory grew at its highest.
LONG = """
import resource, sys, tracemalloc
from pathlib import Path
from pipelines.training.record import History, StepRecord
path, steps = Path(sys.argv[1]), 200_000
line = path.read_text()
with path.open("w") as file:
    for step in range(1, steps + 1):
        file.write(line.replace('"step": 1,', f'"step": {step},'))
tracemalloc.start()
history = History(path)
template = StepRecord.from_line(line)
values = {**vars(template)}
for first in range(steps + 1, steps + 2001, 100):
    history.add(StepRecord(**values | {"step": step}) for step in range(first, first + 100))
assert sum(1 for _ in history.read()) == steps + 2000 == history.last_step
print(tracemalloc.get_traced_memory()[1] / 1e6)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_record_of_200000_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(record(1).to_line() + "\n")
    done = subprocess.run([sys.executable, "-c", LONG, str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3


class LocalQueue:
    """What the recorder needs of a queue, within one process."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def qsize(self) -> int:
        return len(self.lines)

    def get_nowait_batch(self, count: int) -> list[str]:
        taken, self.lines = self.lines[:count], self.lines[count:]
        return taken


def recorder(history, queue, **changes) -> Recorder:
    silent = {"on_record": lambda _: None, "on_event": lambda _: None, "on_failure": lambda: None}
    return Recorder(queue=queue, history=history, **silent | changes)


def test_recorder_writes_records_and_hands_on_events(tmp_path):
    queue, events = LocalQueue(), []
    history = History(tmp_path / "metrics.jsonl")
    with recorder(history, queue, on_event=events.append):
        queue.lines += [record(1).to_line(), event("start", step=0), record(2).to_line()]
        wait_until(lambda: history.last_step == 2)
        queue.lines.append(record(3).to_line())
    assert history.last_step == 3, "what is left in the queue is taken on leaving"
    assert events == [{"event": "start", "step": 0}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["no record"], "Expecting value"), (['{"step": 2}'], "not the record"), ([record(4).to_line()], "leaves a gap")],
)
def test_a_line_that_would_leave_a_gap_ends_the_training_at_once(tmp_path, lines, message):
    queue, ended = LocalQueue(), threading.Event()
    history = History(tmp_path / "metrics.jsonl")
    history.add([record(1)])
    following = recorder(history, queue, on_failure=ended.set)
    with following:
        queue.lines += lines
        assert ended.wait(30)
    assert message in str(following.failure)
    assert [kept.step for kept in History(history.path).read()] == [1]


def test_a_callback_that_fails_costs_no_record_and_is_told_once(tmp_path, caplog):
    queue = LocalQueue()
    history = History(tmp_path / "metrics.jsonl")

    def fail(_: object) -> None:
        raise BrokenPipeError("the terminal is gone")

    with recorder(history, queue, on_record=fail, on_event=fail) as following:
        queue.lines += [record(1).to_line(), record(2).to_line(), event("start")]
        wait_until(lambda: history.last_step == 2)
    assert following.failure is None
    assert [line for line in caplog.messages if "the progress could not be shown" in line] == [
        "the progress could not be shown or kept (BrokenPipeError: the terminal is gone); training goes on"
    ]


def test_a_record_that_cannot_be_written_is_kept_and_written_later(tmp_path, caplog):
    folder = tmp_path / "out"
    folder.mkdir()
    queue, history = LocalQueue(), History(folder / "metrics.jsonl")
    history.add([record(1)])
    folder.rename(tmp_path / "gone")  # as a mount that went away
    with recorder(history, queue) as following:
        queue.lines += [record(2).to_line(), record(3).to_line()]
        wait_until(lambda: caplog.messages)
        os.rename(tmp_path / "gone", folder)
        wait_until(lambda: history.last_step == 3)
    assert following.failure is None
    assert "metrics.jsonl cannot be written, which is tried again; training goes on" in caplog.messages[0]
    assert [kept.step for kept in History(history.path).read()] == [1, 2, 3]


def test_a_queue_that_breaks_is_noticed_at_once(ray_cluster, tmp_path):
    import ray

    queue, ended = open_queue(), threading.Event()
    history = History(tmp_path / "metrics.jsonl")
    following = recorder(history, queue, on_failure=ended.set)
    with following:
        queue.put(record(1).to_line())
        wait_until(lambda: history.last_step == 1)
        ray.kill(queue.actor)
        assert ended.wait(30)
    assert isinstance(following.failure, ray.exceptions.RayActorError)
    assert History(history.path).last_step == 1
