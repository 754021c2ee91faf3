import pytest

from pipelines.training.history import History, StepRecord


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        time=1000.0 + step,
        loss=loss,
        frame_losses=(loss, loss / 2),
        lr=0.1,
        grad_norm=1.0,
        tokens=10,
        tokens_per_s=5.0,
        step_seconds=2.0,
        data_wait=0.0,
        masked_share=0.7,
        masked_tokens=7,
        epoch=0,
    )


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


def test_history_refuses_a_gap(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="ends at step 0; the record of step 2 leaves a gap"):
        history.add([record(2)])


def test_step_record_gives_the_metrics_of_a_run():
    row = record(3, loss=2.0).metrics()
    assert (row.step, row.time) == (3, 1003.0)
    assert row.values["loss_frame_1"] == 1.0
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_seconds", "data_wait", "masked_share"} <= row.values.keys()
