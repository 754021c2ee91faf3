import math
import re
from dataclasses import replace

import pytest

from lumos.flops import Workload, dense_flops, exact_flops
from lumos.layout import video_layout
from pipelines.training.metrics import METRICS, MetricStream, RunFacts
from tests.pipelines.training.runs import TINY, step_record

MODEL = TINY.resolve(300)
FACTS = RunFacts(model=MODEL, codebook_size=64, num_rows=40, muon_factor=None, workers=2)
BODY = video_layout(0, (2, 4, 4)).length


def record(step, **changes):
    values = {
        "clips": 8,
        "bucket": "2x4x4",
        "tokens": 8 * (BODY + 6),
        "step_seconds": 2.0,
        "tokens_per_s": 4.0 * BODY + 24,
    }
    return replace(step_record(step), **values | changes)


def rows(stream, records):
    return [row for each in records for row in stream.add(each)]


def test_each_step_has_a_row_with_its_own_figures_and_the_totals_so_far():
    stream = MetricStream(facts=FACTS, log_every=1)
    first, second = rows(stream, [record(1, loss=2.0), record(2, loss=1.0, lr=0.05, bucket="1x4x4", skipped=1)])
    assert (first.step, first.time, first.values["loss"], first.values["loss_frame_1"]) == (1, 1001.0, 2.0, 0.5)
    assert first.values["perplexity"] == pytest.approx(math.exp(2.0))
    assert (second.values["lr"], second.values["clips_seen"], second.values["skipped_steps"]) == (0.05, 16, 1)
    assert second.values["epoch"] == pytest.approx(16 / 40)
    assert (second.values["steps_of/2x4x4"], second.values["steps_of/1x4x4"]) == (1, 1)
    assert second.values["tokens_per_s_per_device"] == second.values["tokens_per_s"] / 2
    assert "mfu" not in second.values, "the peak of this device is not known"


def test_rows_of_several_steps_have_means_sums_and_last_values():
    stream = MetricStream(facts=FACTS, log_every=2)
    steps = [
        record(1, loss=2.0, lr=0.1, checkpoint_seconds=3.0, phases={"forward": 1.0}, rss_gb=1.0),
        record(2, loss=4.0, lr=0.2, phases={"forward": 3.0}, rss_gb=2.0, step_seconds=6.0),
        record(3, loss=8.0),
    ]
    (row,) = rows(stream, steps)
    wanted = {
        "loss": 3.0,
        "lr": 0.2,
        "checkpoint_seconds": 3.0,
        "seconds_forward": 2.0,
        "rss_gb": 2.0,
        "clips_seen": 16,
    }
    assert row.step == 2
    assert {name: row.values[name] for name in wanted} == wanted
    assert row.values["tokens_per_s"] == pytest.approx(2 * steps[0].tokens / 8.0)
    (rest,) = stream.flush()
    assert (rest.step, rest.values["loss"], rest.values["clips_seen"]) == (3, 8.0, 24)
    assert list(stream.flush()) == []


def test_a_skipped_step_spoils_no_mean_and_what_is_not_finite_is_left_out():
    stream = MetricStream(facts=FACTS, log_every=2)
    (row,) = rows(stream, [record(1, loss=2.0), record(2, loss=math.nan, grad_norm=math.inf, skipped=1)])
    assert (row.values["loss"], row.values["grad_norm"]) == (2.0, 1.0)
    (row,) = rows(MetricStream(facts=FACTS, log_every=1), [record(1, loss=math.nan, skipped=1)])
    assert "loss" not in row.values
    assert row.values["skipped_steps"] == 1


def test_mfu_is_by_the_flops_of_the_steps_own_layouts():
    stream = MetricStream(facts=FACTS, log_every=1, peak_flops=1e9)
    (row,) = rows(stream, [record(1, masked_tokens=100)])
    work = Workload.of([video_layout(6, (2, 4, 4))] * 8, visual_predictions=100)
    exact = exact_flops(MODEL, work, visual_classes=64).model / 2.0 / 2 / 1e9
    assert row.values["mfu_exact"] == pytest.approx(exact)
    assert row.values["mfu"] == pytest.approx(dense_flops(MODEL, work).model / 2.0 / 2 / 1e9)
    (row,) = rows(stream, [step_record(2)])
    assert "mfu" not in row.values, "a record of an older program does not say what its step was"


def test_a_validation_has_a_row_at_its_own_step():
    stream = MetricStream(facts=FACTS, log_every=4)
    (row,) = rows(stream, [record(1), record(2, val_loss=3.0, val_frame_losses=(2.0, 4.0), val_seconds=0.5)])
    assert row.step == 2
    wanted = {"val/loss": 3.0, "val/frame_00": 2.0, "val/frame_01": 4.0, "val/seconds": 0.5}
    assert {name: row.values[name] for name in wanted} == wanted


def test_totals_go_on_after_steps_that_were_sent():
    whole, resumed = (MetricStream(facts=FACTS, log_every=2) for _ in range(2))
    steps = [record(step, datasets={"a": 8}) for step in range(1, 7)]
    for each in steps[:4]:
        resumed.skip(each)
    assert rows(resumed, steps[4:]) == rows(whole, steps)[2:]


def test_every_metric_is_in_the_table():
    patterns = [
        re.compile(
            name.replace("XX", r"\d\d").replace("TxHxW", r"\d+x\d+x\d+").replace("DATASET", ".+").replace("_N", r"_\d+")
        )
        for name in METRICS
    ]
    facts = replace(FACTS, muon_factor=3.0)
    phases = {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.1}
    full = record(
        1, memory_gb=1.0, rss_gb=2.0, phases=phases, val_loss=1.0, val_frame_losses=(1.0,), datasets={"s3://b/a": 8}
    )
    found = {
        name for row in rows(MetricStream(facts=facts, log_every=1, peak_flops=1e9), [full]) for name in row.values
    }
    missing = [name for name in found if not any(pattern.fullmatch(name) for pattern in patterns)]
    assert not missing
