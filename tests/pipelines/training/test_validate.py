"""Validation on held-out rows, in real engines without Ray."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lumos.batch import PackedBatch
from lumos.config import MaskConfig
from lumos.decoder import Decoder
from lumos.losses import LossModule
from lumos.masking import sample_masked_positions
from pipelines.streams import torch_stream
from pipelines.training.config import ValidationConfig
from pipelines.training.ingest import StepLoader
from pipelines.training.prepare import prepare
from pipelines.training.validate import choose_rows, describe
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot

TRAIN = {(2, 4, 4): 21, (3, 4, 6): 8}
HELD_OUT = {(1, 4, 4): 3, (2, 4, 4): 6, (3, 4, 6): 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("data") / "dataset", TRAIN, held_out=HELD_OUT)


def alone(dataset, folder, weights):
    """The validation's figures by a plain model, a row at a time, in float64 sums."""
    config = tiny_config(dataset, folder / "alone", validation=ValidationConfig(every=2, rows=9))
    run = prepare(config)
    model = Decoder(run.model)
    model.load_state_dict(weights, strict=False)  # without the rows of text, which play no part
    module, loader = LossModule(model, run.vocabulary, 0.0), StepLoader(run, 0, 1)
    totals = torch.zeros(2, 3, dtype=torch.float64)
    for chosen in choose_rows(run):
        bucket = run.datasets[0].manifest.buckets[chosen.bucket]
        record = loader.rows[0].row(chosen.bucket, chosen.row)
        assert record["clip_id"].startswith("val-")
        ids, layout, _ = loader.sequence(0, record, bucket.shape, record["captions"][0]["text"])
        masked = sample_masked_positions(layout, MaskConfig(), torch_stream(0, "validation mask", record["clip_id"]))
        with torch.no_grad():
            _, sums, counts = module(PackedBatch(ids.long(), masked, (layout,)), bucket.t)
        totals[:, : bucket.t] += torch.stack([sums, counts])
    sums, counts = totals
    return float(sums.sum() / counts.sum()), (sums / counts).tolist(), int(counts.sum())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_validation_is_that_of_a_plain_model_and_leaves_training_bitwise_the_same(dataset, tmp_path, stage):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.pipelines.training.validation", stage, str(dataset), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 3
    assert found[-1]["val_loss"] != found[0]["val_loss"]
    loss, frames, tokens = alone(dataset, tmp_path, torch.load(tmp_path / "weights.pt"))
    assert found[-1]["val_tokens"] == tokens
    assert found[-1]["val_loss"] == pytest.approx(loss, abs=2e-6)
    assert found[-1]["val_frame_losses"] == pytest.approx(frames, abs=5e-6)


def test_rows_depend_on_the_validations_seed_alone(dataset, tmp_path):
    run = prepare(tiny_config(dataset, tmp_path))

    def chosen(**wanted):
        return choose_rows(replace(run, config=replace(run.config, validation=ValidationConfig(**wanted))))

    few = chosen(rows=5)
    assert len(set(few)) == 5
    assert few == sorted(few, key=lambda row: (row.bucket, row.row))
    assert few != chosen(rows=5, seed=1)
    everything = chosen(rows=100)
    assert len(everything) == sum(HELD_OUT.values())
    assert set(few) <= set(everything)


def test_a_snapshot_without_held_out_rows_is_told(tmp_path):
    config = tiny_config(write_snapshot(tmp_path / "dataset", TRAIN), tmp_path)
    run = prepare(config)
    assert "has no rows of the split 'val'; training goes on without" in describe(run)
    assert "publish.val_share" in describe(run)
    assert describe(replace(run, config=replace(config, validation=ValidationConfig(every=0)))) is None


def test_held_out_rows_that_the_run_cannot_read_are_left_out_and_told(tmp_path):
    held_out = {(2, 4, 4): 3, (2, 4, 5): 2, (9, 16, 16): 4}  # an odd width, and more than 512 tokens
    run = prepare(tiny_config(write_snapshot(tmp_path / "dataset", TRAIN, held_out=held_out), tmp_path))
    shapes = [run.datasets[0].manifest.buckets[row.bucket].shape for row in choose_rows(run)]
    assert shapes == [(2, 4, 4)] * 3
    assert describe(run).startswith("validation is without 6 rows of 9 (2x4x5, 9x16x16): they are longer than")


def test_validation_is_no_part_of_what_a_run_computes(dataset, tmp_path):
    config = tiny_config(dataset, tmp_path)
    other = replace(config, validation=ValidationConfig(every=3, rows=2, seed=5))
    assert other.identity_hash() == config.identity_hash()
    with pytest.raises(ValueError, match=r"validation.split = train is trained on"):
        replace(config, validation=ValidationConfig(split="train"))
