from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lumos.config import TokenizerInfo
from pipelines.data.snapshot.read import Bucket, LedgerInfo, Manifest, Shard
from pipelines.errors import UserError
from pipelines.training import batch_plan as plan_module
from pipelines.training.batch_plan import BatchPlan, PlanBucket, rank_rows
from pipelines.training.config import MixConfig, SourceConfig, TrainConfig
from tests.pipelines.training.runs import tiny_config

IMAGE, VIDEO = (1, 4, 4), (3, 4, 4)


def make_plan(*rows, seed=0, batch=4, order=2, row_bytes=1, group_rows=3, shard_rows=7):
    """Buckets of as many rows in small shards; with rows of a few kB they are too large to be shuffled whole."""
    buckets, first = [], 0
    for index, count in enumerate(rows):
        shards = tuple(min(shard_rows, count - start) for start in range(0, count, shard_rows))
        buckets.append(PlanBucket(0, index, (2 + index, 4, 4), shards, first, batch, group_rows, row_bytes))
        first += count
    steps = [Fraction(bucket.num_rows, batch) for bucket in buckets]
    return BatchPlan(buckets, steps, seed=seed, order=order)


def make_manifest(buckets, *, split="train"):
    """A manifest of buckets (latent shape -> rows)."""
    entries = []
    for (t, h, w), rows in buckets.items():
        shards = tuple(Shard(f"{t}-{start}", min(5, rows - start), 1, "") for start in range(0, rows, 5))
        entries.append(Bucket(split, t, h, w, rows, 1, shards, row_group_rows=2))
    return Manifest(
        snapshot_id="v0001-00000000",
        tokenizer=TokenizerInfo("fsq", 64, (4, 8, 8), ""),
        buckets=tuple(entries),
        totals={},
        ledger=LedgerInfo(0, {}, ()),
        created_from={},
    )


def make_config(sources=(), mix=None, **changes) -> TrainConfig:
    config = tiny_config(Path("d"), Path("o"))
    data = replace(config.data, dataset=None if sources else "d", sources=tuple(sources), mix=mix)
    return replace(config, data=data, num_workers=1, **changes)


def sources(**values):
    """Sources a, b, ... with their weights or repeats."""
    name = "weight" if "repeat" not in values else "repeat"
    return [SourceConfig(dataset=key, **{name: value}) for key, value in zip("abc", values[name], strict=False)]


LANES = {"row_bytes": 1 << 20}


@pytest.mark.parametrize("kind", [{}, LANES, {"order": 1}])
def test_plan_is_a_pure_function_of_its_arguments(kind):
    steps = [make_plan(13, 8, **kind).step(index) for index in range(30)]
    again = make_plan(13, 8, **kind)
    assert [again.step(index) for index in reversed(range(30))] == steps[::-1]
    assert [make_plan(13, 8, seed=1, **kind).step(index).rows for index in range(30)] != [step.rows for step in steps]


@pytest.mark.parametrize("kind", [{}, LANES, {"order": 1}])
def test_plan_reads_every_row_exactly_once_per_epoch(kind):
    plan = make_plan(12, 8, **kind)
    epochs = [[plan.step(5 * epoch + index) for index in range(5)] for epoch in range(3)]
    for number, steps in enumerate(epochs):
        assert {step.epoch for step in steps} == {number}
        assert sorted(step.row_id(row) for step in steps for row in step.rows) == list(range(20))
    assert len({tuple(step.rows for step in steps) for steps in epochs}) == 3, "epochs are shuffled anew"


@pytest.mark.parametrize("seed", range(20))
def test_plan_reads_every_row_equally_often_whatever_the_sizes(seed):
    draw = np.random.default_rng(seed)
    rows, batch = draw.integers(1, 60, draw.integers(1, 4)).tolist(), int(draw.integers(1, 9))
    rows[0] = max(rows[0], batch)
    sizes = {"group_rows": int(draw.integers(1, 9)), "shard_rows": int(draw.integers(1, 30))}
    plan = make_plan(*rows, batch=batch, **sizes, **(LANES if seed % 4 else {}))
    epochs = 2 * batch  # batches and laps end together
    steps = list(map(plan.step, range(epochs * sum(rows) // batch)))
    counts = Counter(step.row_id(row) for step in steps for row in step.rows)
    assert counts == dict.fromkeys(range(sum(rows)), epochs)
    assert plan.step(len(steps)).epoch == epochs
    assert all(len(step.rows) == batch for step in steps)
    for which, bucket in enumerate(plan.buckets):  # and once in each lap
        own = [row for step in steps if step.bucket.index == which for row in step.rows]
        laps = [own[start : start + bucket.num_rows] for start in range(0, len(own), bucket.num_rows)]
        assert all(sorted(lap) == list(range(bucket.num_rows)) for lap in laps)


def test_order_1_is_that_of_older_programs():
    # 23 rows in two buckets, as an older program planned them; small data are read in the same order today.
    older = [make_plan(15, 8, order=1, shard_rows=3).step(index).rows for index in range(6)]
    assert older == OLDER
    assert [make_plan(15, 8, shard_rows=3).step(index).rows for index in range(6)] == older


OLDER = [(7, 4, 6, 13), (8, 2, 3, 0), (3, 4, 5, 1), (2, 0, 7, 6), (10, 9, 5, 12), (11, 14, 1, 5)]


def test_order_1_shuffles_whole_shards_within_windows(monkeypatch):
    monkeypatch.setattr(plan_module, "WINDOW_ROWS", 6)
    plan = make_plan(30, batch=6, order=1, shard_rows=3)
    for index in range(5):
        assert len({row // 3 for row in plan.step(index).rows}) == 2, "two shards of three rows at a time"
    assert sorted(row for index in range(5) for row in plan.step(index).rows) == list(range(30))


@pytest.mark.parametrize(("workers", "lap"), [(1, 0), (2, 0), (8, 0), (8, 1), (8, 2)])
def test_a_worker_reads_a_row_group_within_few_steps(workers, lap):
    """What it needs to keep at a time is small, and but at the seams no row group is read by two workers."""
    group_rows, batch, rows = 5, 16, 16 * 50 + 3
    plan = make_plan(rows, batch=batch, group_rows=group_rows, shard_rows=100, row_bytes=4000)
    steps = [plan.step(index) for index in range(lap * rows // batch + 1, (lap + 1) * rows // batch)]
    readers = Counter()
    for rank in range(workers):
        shares = [rank_rows(step.rows, rank=rank, num_workers=workers, micro_batches=1)[0] for step in steps]
        groups = [{(row // 100, row % 100 // group_rows) for row in share} for share in shares]
        readers.update(set.union(*groups))
        spans = [[index for index, used in enumerate(groups) if group in used] for group in set.union(*groups)]
        assert all(span[-1] - span[0] < 2 * 12 for span in spans), "windows have 12 rows"
    assert sum(readers.values()) <= len(readers) + 2 * workers


def test_lanes_are_shuffled():
    plan = make_plan(800, batch=8, group_rows=10, shard_rows=100, row_bytes=4000)
    rows = np.array([plan.step(index).rows for index in range(100)])
    assert not np.any(np.all(np.diff(rows[:, 0].reshape(-1, 10)) == 1, axis=1)), "no row group is read in its order"
    assert len(set(rows[:10, 0] // 10)) > 1, "a window is of several row groups"
    assert len({frozenset(plan.step(index).rows) for index in range(200)}) == 200, "other rows meet in the next epoch"


def test_plan_of_60_million_rows_is_made_in_little_memory():
    shards = (35_000,) * 1720
    bucket = PlanBucket(0, 0, (1, 32, 56), shards, 0, 288, 31, 4096)
    plan = BatchPlan([bucket], [Fraction(bucket.num_rows, 288)], seed=0, order=2)
    rows = plan.step(199_999).rows
    assert len(set(rows)) == 288
    lap = plan._lap(0, 0)
    assert sum(value.nbytes for value in vars(lap).values() if isinstance(value, np.ndarray)) < 64e6


@pytest.mark.parametrize(
    ("mix", "batches", "images"),
    [
        (MixConfig(image=1, video=1), {}, 0.5),
        (MixConfig(image=1, video=3), {}, 0.25),
        (MixConfig(image=0.5, video=1.5), {"image_batch": 48}, 0.25),
        (MixConfig(video=2), {}, 0.0),
        (None, {}, 0.2),
        (None, {"image_batch": 2}, 0.5),
    ],
)
def test_images_and_videos_in_the_ratio_asked_for(mix, batches, images):
    manifest = make_manifest({IMAGE: 50, VIDEO: 120, (5, 4, 4): 80})
    plan = BatchPlan.from_manifests([manifest], make_config(mix=mix, global_batch=8, **batches))
    steps = [plan.step(index) for index in range(400)]
    seen = Counter(step.bucket.kind for step in steps)
    assert seen["image"] == pytest.approx(400 * images, abs=1 if mix else 12)
    for step in steps:
        assert len(step.rows) == (batches.get("image_batch", 8) if step.bucket.kind == "image" else 8)
    videos = Counter(step.bucket.shape for step in steps if step.bucket.kind == "video")
    assert videos[VIDEO] / videos[5, 4, 4] == pytest.approx(1.5, rel=0.1), "buckets of a kind by their rows"
    if mix == MixConfig(image=1, video=1):
        assert [step.bucket.kind for step in steps[:6]] == ["image", "video"] * 3


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (sources(weight=[1, 1]), (0.5, 0.5)),
        (sources(weight=[3, 1]), (0.75, 0.25)),
        (sources(weight=[0.1, 0.9]), (0.1, 0.9)),
        (sources(repeat=[1, 2]), (0.6, 0.4)),
        (sources(repeat=[None, None]), (0.75, 0.25)),
    ],
)
def test_shares_of_datasets_are_as_configured(chosen, expected):
    manifests = [make_manifest({VIDEO: 200, (5, 4, 4): 100}), make_manifest({VIDEO: 100})]
    plan = BatchPlan.from_manifests(manifests, make_config(chosen, global_batch=4))
    steps = [plan.step(index) for index in range(1000)]
    seen = Counter(step.bucket.dataset for step in steps)
    assert (seen[0] / 1000, seen[1] / 1000) == pytest.approx(expected, abs=0.01)
    for start in range(0, 1000, 100):  # and in every stretch, not on average only
        part = Counter(step.bucket.dataset for step in steps[start : start + 100])
        assert part[0] == pytest.approx(100 * expected[0], abs=4)
    # Of each dataset, each row as often as any other, and no two rows of the run have one id.
    for dataset in (0, 1):
        counts = Counter(step.row_id(row) for step in steps for row in step.rows if step.bucket.dataset == dataset)
        assert max(counts.values()) - min(counts.values()) <= 2
        assert set(counts) == set(range(300) if dataset == 0 else range(300, 400))


def test_repeats_are_exact_over_an_epoch():
    manifests = [make_manifest({VIDEO: 200}), make_manifest({VIDEO: 100})]
    plan = BatchPlan.from_manifests(manifests, make_config(sources(repeat=[1, 3]), global_batch=4))
    counts = Counter((s.bucket.dataset, row) for s in map(plan.step, range(125)) for row in s.rows)
    assert [{n for (dataset, _), n in counts.items() if dataset == which} for which in (0, 1)] == [{1}, {3}]
    assert (plan.step(124).epoch, plan.step(125).epoch) == (0, 1)


def test_weights_hold_within_each_kind_of_a_mix():
    manifests = [
        make_manifest({IMAGE: 400, VIDEO: 40}),
        make_manifest({IMAGE: 20, VIDEO: 40}),
        make_manifest({IMAGE: 9}),
    ]
    config = make_config(sources(weight=[1, 1, 2]), MixConfig(image=1, video=1), global_batch=4)
    plan = BatchPlan.from_manifests(manifests, config)
    seen = Counter((s.bucket.kind, s.bucket.dataset) for s in map(plan.step, range(800)))
    wanted = {("image", 0): 100, ("image", 1): 100, ("image", 2): 200, ("video", 0): 200, ("video", 1): 200}
    assert seen.keys() == wanted.keys()
    assert all(seen[key] == pytest.approx(count, abs=5) for key, count in wanted.items())


@pytest.mark.parametrize(
    ("manifests", "config", "message"),
    [
        ([make_manifest({VIDEO: 3})], {}, r"3 training rows, fewer than a batch of global_batch = 8.*at most 3"),
        ([make_manifest({})], {}, r"0 training rows, fewer"),
        ([make_manifest({IMAGE: 3, VIDEO: 20})], {"image_batch": 4}, r"3 training rows, .* image_batch = 4"),
        (
            [make_manifest({VIDEO: 20})],
            {"mix": MixConfig(image=1, video=1)},
            r"data.mix names image, and there is no im",
        ),
        (
            [make_manifest({VIDEO: 20}), make_manifest({VIDEO: 9}, split="val")],
            {"sources": sources(weight=[1, 1])},
            r"data.sources: b has no rows of the split 'train'",
        ),
        (
            [make_manifest({VIDEO: 20}), make_manifest({IMAGE: 9})],
            {"sources": sources(weight=[1, 1]), "mix": MixConfig(video=1)},
            r"data.sources: b has no rows .*that are to be trained on",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(manifests, config, message):
    with pytest.raises(UserError, match=message):
        BatchPlan.from_manifests(manifests, make_config(**config))


@pytest.mark.parametrize(("workers", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_rank_rows_divide_a_step_for_any_number_of_workers(workers, micro_batches):
    rows = tuple(range(100, 108))
    shares = [rank_rows(rows, rank=rank, num_workers=workers, micro_batches=micro_batches) for rank in range(workers)]
    assert [row for share in shares for micro in share for row in micro] == list(rows)
    assert {len(share) for share in shares} == {micro_batches}
    sizes = {len(micro) for share in shares for micro in share}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_rank_rows_may_be_uneven():
    shares = [rank_rows(range(8), rank=rank, num_workers=3, micro_batches=3) for rank in range(3)]
    assert shares == [[(0,), (1,)], [(2,), (3,), (4,)], [(5,), (6,), (7,)]]
    with pytest.raises(ValueError, match="8 rows are too few for 9 workers"):
        rank_rows(range(8), rank=0, num_workers=9, micro_batches=1)
