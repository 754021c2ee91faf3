"""What the driver does around the workers, without them."""

import signal
from dataclasses import replace

import pytest

from pipelines.tracking import sqlite_uri
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.run import _interruptible, _open_tracker
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot


def test_an_interrupt_of_the_workers_is_one_of_the_driver():
    before = signal.getsignal(signal.SIGINT)

    def interrupted_by_ray():
        with _interruptible():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray Train sets a handler, which stays, and exits with 0
            raise SystemExit(0)

    with pytest.raises(KeyboardInterrupt):
        interrupted_by_ray()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_store_gets_all_steps(tmp_path):
    config = tiny_config(write_snapshot(tmp_path / "dataset", {(2, 4, 4): 13}), tmp_path / "out")
    prepared = prepare(config)
    output = Output(config, snapshot_digest=prepared.snapshot.digest)
    output.begin(config)
    first = _open_tracker(config, output, prepared)
    output.update(sent=10, finished=True)
    assert _open_tracker(config, output, prepared).run_id == first.run_id
    assert (output.run.sent, output.run.finished) == (10, True)
    elsewhere = replace(config, tracking=replace(config.tracking, uri=sqlite_uri(tmp_path)))
    moved = Output(elsewhere, snapshot_digest=prepared.snapshot.digest)
    assert _open_tracker(elsewhere, moved, prepared).run_id != first.run_id
    assert (moved.run.sent, moved.run.finished) == (0, False)
