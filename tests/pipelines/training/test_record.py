import json
from dataclasses import MISSING, dataclass, fields

import pytest

from pipelines.errors import UserError
from pipelines.training import record as record_module
from pipelines.training.record import History, StepRecord
from tests.pipelines.training.runs import step_record as record

# What every line of `metrics.jsonl` has had from the first program on.
FIRST_FIELDS = {
    "step", "time", "loss", "frame_losses", "lr", "grad_norm", "tokens", "tokens_per_s", "step_seconds", "data_wait",
    "masked_share", "masked_tokens", "epoch",
}  # fmt: skip


def test_history_records_a_replayed_step_once(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    assert len(history.add([record(1), record(2), record(3)])) == 3
    assert [new.step for new in history.add([record(2, loss=9.0), record(3), record(4)])] == [4]
    assert [kept.loss for kept in History(history.path).records] == [1.0] * 4
    assert History(history.path).last_step == 4


def test_history_drops_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    History(path).add([record(1), record(2)])
    path.write_text(path.read_text() + record(3).to_line()[:40])
    history = History(path)
    assert history.last_step == 2
    history.add([record(3)])
    assert [kept.step for kept in History(path).records] == [1, 2, 3]


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
    assert [kept.step for kept in history.records] == [1, 2, 3]
    assert history.records[2].unknown == {"z_loss": 3 / 8, "note": ["ä", None]}
    history.add([record(4)])
    assert path.read_text().splitlines() == [*newer_lines(3), record(4).to_line()]
    copy = History(tmp_path / "copy.jsonl")  # as the record that a checkpoint carries is taken over
    copy.add(History(path).records)
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
    assert [(kept.step, kept.z_loss) for kept in history.records] == [(1, -1.0), (2, -1.0)]
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


def test_step_record_gives_the_metrics_of_a_run():
    row = record(3, loss=2.0).metrics()
    assert (row.step, row.time) == (3, 1003.0)
    assert row.values["loss_frame_1"] == 1.0
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_seconds", "data_wait", "masked_share"} <= row.values.keys()
