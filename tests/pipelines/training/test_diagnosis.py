import gzip
import json
import re
import time
from dataclasses import replace

import pytest
import torch

from pipelines.training.config import DiagnosisConfig, OptimizerConfig, ProfileConfig, ResourceConfig
from pipelines.training.diagnosis import Diagnosis, PhaseClock, keep_stacks, memory_hint
from tests.pipelines.training.runs import TINY, tiny_config

CPU = torch.device("cpu")


def diagnosis(tmp_path, lines, **changes):
    config = tiny_config(tmp_path, tmp_path / "out", **changes)
    return Diagnosis(config, rank=1, device=CPU, uri=str(tmp_path / "profile"), put=lines.append)


def wait_for(lines):
    for _ in range(3000):
        if lines:
            return json.loads(lines[0])
        time.sleep(0.01)
    raise AssertionError("nothing came")


def test_parts_of_a_step_are_summed_until_they_are_taken():
    clock = PhaseClock(CPU)
    for _ in range(2):
        with clock("forward"):
            time.sleep(0.01)
    clock.add("data", 0.5)
    taken = clock.take()
    assert taken.keys() == {"forward", "data"}
    assert taken["data"] == 0.5
    assert taken["forward"] >= 0.02
    assert clock.take() == {}


def test_each_worker_tells_the_mean_of_some_steps(tmp_path):
    lines: list[str] = []
    watch = diagnosis(tmp_path, lines, diagnosis=DiagnosisConfig(phases_every=2, hang_seconds=0))
    watch.clock.add("checkpoint", 4.0)
    for step, seconds in ((1, 1.0), (2, 3.0), (3, 5.0)):
        watch.clock.add("forward", seconds)
        figures = watch.figures(step)
        assert figures["phases"] == {"forward": seconds}
        assert figures["checkpoint_seconds"] == (4.0 if step == 1 else 0.0)
        assert figures["rss_gb"] > 0
    (line,) = map(json.loads, lines)
    assert (line["event"], line["step"], line["rank"], line["steps"]) == ("phases", 2, 1, 2)
    assert line["seconds"] == {"checkpoint": 2.0, "forward": 2.0}


def stand_still_for(seconds):
    time.sleep(seconds)


def test_a_step_that_hangs_has_its_stacks_written(tmp_path):
    lines: list[str] = []
    watch = diagnosis(tmp_path, lines, diagnosis=DiagnosisConfig(hang_seconds=0.5))
    with watch.step(7):
        stand_still_for(2.0)
    said = wait_for(lines)
    watch.close()
    assert (said["event"], said["step"], said["rank"]) == ("hang", 7, 1)
    assert "in stand_still_for" in said["stacks"]
    file = keep_stacks(tmp_path, said)
    assert file == tmp_path / "hangs" / "step-00000007" / "rank-00001.txt"
    assert file.read_text() == said["stacks"]


def test_steps_that_go_on_tell_nothing(tmp_path):
    lines: list[str] = []
    watch = diagnosis(tmp_path, lines, diagnosis=DiagnosisConfig(hang_seconds=5.0, phases_every=0))
    for step in range(1, 4):
        with watch.step(step):
            pass
        watch.figures(step)
    watch.close()
    assert lines == []


@pytest.mark.parametrize("first", [1, 3])  # a run may go on in the midst of them
def test_the_steps_asked_for_are_profiled(tmp_path, first):
    watch = diagnosis(tmp_path, [], profile=ProfileConfig(steps=(2, 3)))
    for step in range(first, 5):
        with watch.step(step), torch.profiler.record_function(f"step number {step}"):
            torch.ones(4) @ torch.ones(4)
    watch.close()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == f"steps-{max(2, first):08d}-00000003-rank-00001.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    profiled = {f"step number {step}" for step in range(max(2, first), 4)}
    assert {name for name in names if name and name.startswith("step number")} == profiled


def test_out_of_memory_names_the_keys_that_would_help(tmp_path):
    watch = diagnosis(tmp_path, [], model=replace(TINY, checkpoint_activations=False))
    said = r"rank 1, step 5: out of memory .*model.checkpoint_activations=true.*zero2"
    with pytest.raises(MemoryError, match=said), watch.step(5):  # which a worker does not try again
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), watch.step(6):
        raise RuntimeError("another")
    watch.close()


GPU = {"resources": ResourceConfig(device="gpu"), "precision": "bf16"}


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({"deepspeed": "zero3"}, []),
        ({"deepspeed": "zero1-gpu", **GPU}, ["zero2-gpu", "zero2-offload-gpu"]),
        ({"deepspeed": "zero3-gpu", **GPU}, ["zero3-offload-gpu"]),
        ({"deepspeed": "zero1-gpu", "optimizer": OptimizerConfig(kind="muon", clip_norm=0), **GPU}, []),  # refused
    ],
)
def test_hints_leave_out_what_is_set_already_or_would_be_refused(tmp_path, changes, files):
    shape = replace(TINY, checkpoint_activations=True)
    hint = memory_hint(tiny_config(tmp_path, tmp_path, model=shape, **changes))
    assert "checkpoint_activations" not in hint
    assert re.findall(r"deepspeed=([\w-]+)", hint) == files
