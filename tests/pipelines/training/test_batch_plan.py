from collections import Counter

import pytest

from pipelines.errors import UserError
from pipelines.training import batch_plan as plan_module
from pipelines.training.batch_plan import BatchPlan, PlanBucket, rank_rows


def make_plan(*rows: int, seed: int = 0, global_batch: int = 4) -> BatchPlan:
    buckets, first = [], 0
    for index, count in enumerate(rows):
        shards = tuple(min(3, count - start) for start in range(0, count, 3))
        buckets.append(PlanBucket(index, (2 + index, 4, 4), shards, first))
        first += count
    return BatchPlan(buckets, seed=seed, global_batch=global_batch)


def test_plan_is_a_pure_function_of_its_arguments():
    steps = [make_plan(13, 8).step(index) for index in range(30)]
    again = make_plan(13, 8)
    assert [again.step(index) for index in reversed(range(30))] == steps[::-1]
    assert [make_plan(13, 8, seed=1).step(index).rows for index in range(30)] != [step.rows for step in steps]


def test_plan_reads_every_row_once_per_epoch():
    plan = make_plan(12, 8, global_batch=4)
    epochs = [[plan.step(5 * epoch + index) for index in range(5)] for epoch in range(3)]
    for number, steps in enumerate(epochs):
        assert {step.epoch for step in steps} == {number}
        assert sorted(step.row_id(row) for step in steps for row in step.rows) == list(range(20))
    assert len({tuple(step.rows for step in steps) for steps in epochs}) == 3, "epochs are shuffled anew"


def test_plan_reads_every_row_equally_often_where_batches_straddle_epochs():
    plan = make_plan(13, 7, 3, global_batch=4)  # 3 rows are fewer than a batch
    steps = 4 * 23 // 4  # four epochs
    counts = Counter((s.bucket.index, row) for s in map(plan.step, range(steps)) for row in s.rows)
    assert len(counts) == 23
    assert set(counts.values()) == {4}
    assert plan.step(steps).epoch == 4


def test_plan_steps_hold_rows_of_one_bucket_and_full_batches():
    plan = make_plan(9, 30, global_batch=6)
    for index in range(40):
        step = plan.step(index)
        assert len(step.rows) == 6
        assert all(0 <= row < step.bucket.num_rows for row in step.rows)


def test_plan_shuffles_whole_shards_within_windows(monkeypatch):
    monkeypatch.setattr(plan_module, "WINDOW_ROWS", 6)
    plan = make_plan(30, global_batch=6)
    for index in range(5):
        assert len({row // 3 for row in plan.step(index).rows}) == 2, "two shards of three rows at a time"
    assert sorted(row for index in range(5) for row in plan.step(index).rows) == list(range(30))


def test_plan_with_fewer_rows_than_one_batch_is_an_error():
    with pytest.raises(UserError, match=r"3 training rows, fewer than a batch of global_batch = 4.*at most 3"):
        make_plan(2, 1)


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_rank_rows_divide_a_step_for_any_number_of_workers(workers, micro_batch):
    rows = tuple(range(100, 108))
    shares = [rank_rows(rows, rank=rank, num_workers=workers, micro_batch=micro_batch) for rank in range(workers)]
    assert [row for share in shares for micro in share for row in micro] == list(rows)
    assert {len(micro) for share in shares for micro in share} == {micro_batch}


def test_rank_rows_refuses_an_uneven_division():
    with pytest.raises(ValueError, match="8 rows do not divide by 3 workers x 1 rows"):
        rank_rows(range(8), rank=0, num_workers=3, micro_batch=1)
