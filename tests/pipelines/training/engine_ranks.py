"""What processes under torchrun do with real engines (test_engine.py starts them); each scenario asserts by itself."""

import errno
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lumos.config import MaskConfig
from lumos.decoder import Decoder
from lumos.layout import build_sequence
from lumos.losses import LossModule, PackedBatch
from lumos.masking import sample_masked_positions
from lumos.vocabulary import Vocabulary
from pipelines.training import saving
from pipelines.training.checkpoints import LoopState, find_checkpoints
from pipelines.training.config import CheckpointConfig, EmaConfig, OptimizerConfig, ResourceConfig, TrainConfig
from pipelines.training.ema import forget_average, update_average
from pipelines.training.engine import Engine, autocast_dtype, make_engine, prepare_process
from pipelines.training.engine_files import EngineFiles, load_engine, master_weights, optimizer_state, save_engine
from pipelines.training.precision import has_bf16_products
from pipelines.training.saving import CheckpointWriter
from pipelines.training.scratch import Scratch, folder_of_node
from pipelines.training.step import StepBatch, StepResult, TrainStep
from tests.pipelines.training.runs import tiny_config

VOCABULARY = Vocabulary.compact(32, 16)
LR = 0.01
MUON = OptimizerConfig(kind="muon", lr=LR, muon_lr=2 * LR, clip_norm=0.0, weight_decay=0.0)
ADAMW = OptimizerConfig(lr=LR, clip_norm=1.0)
ROWS = 4  # of a global batch, whatever the number of processes


def new_engine(config: TrainConfig) -> Engine:
    text = config.optimizer.text_loss_weight
    model = Decoder(config.model.resolve(VOCABULARY.vocab_size, VOCABULARY.visual_start), train_text=text > 0)
    model.init_weights(torch.Generator().manual_seed(0))
    module = LossModule(model, VOCABULARY, text_loss_weight=text, autocast=autocast_dtype(config))
    return make_engine(module, config)


def config_for(
    folder: Path, deepspeed: str, *, precision: str = "fp32", device: str = "cpu", **more: Any
) -> TrainConfig:
    """``device`` gpu: bf16 parameters as there, here on a CPU."""
    if deepspeed == "zero3":  # no tensor is under the threshold: all are divided
        deepspeed = str(folder / f"zero3-{dist.get_rank()}.json")
        Path(deepspeed).write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    resources = ResourceConfig(device=device)
    return replace(tiny_config(folder, folder), deepspeed=deepspeed, precision=precision, resources=resources, **more)


def batches(first: int, stop: int) -> Iterator[StepBatch]:
    """This process' share of the steps: the same rows on any number of processes."""
    share = ROWS // dist.get_world_size()
    for step in range(first, stop):
        own = [row_of(step, dist.get_rank() * share + row) for row in range(share)]
        yield StepBatch(step, 0, tuple(own), (2, 4, 4), 0, ROWS, 0, 0)


def row_of(step: int, row: int) -> PackedBatch:
    seed = step * ROWS + row
    codes = np.random.default_rng(seed).integers(0, 16, (2, 4, 4)) % (seed % 4 + 2)
    ids, layout = build_sequence(VOCABULARY, [1, 2 + seed % 4], codes, fps=12.0)
    masked = sample_masked_positions(layout, MaskConfig(), torch.Generator().manual_seed(seed))
    return PackedBatch(ids, masked, (layout,))


def train(engine: Engine, config: TrainConfig, first: int, stop: int) -> list[StepResult]:
    step = TrainStep(engine, VOCABULARY, device=torch.device("cpu"))
    return [step(batch, lr=LR, data_wait=0.0) for batch in batches(first, stop)]


def losses(results: list[StepResult]) -> list[float]:
    return [result.loss for result in results]


def everything(engine: Engine) -> list[torch.Tensor]:
    """Copies of weights and optimizer state, as this process has them."""
    state = optimizer_state(engine)
    found = []
    for flat, _ in master_weights(engine):
        found.append(flat.detach().clone())
        for key in sorted(state[flat]):
            value = state[flat][key]
            found.append(value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value))
    return found + [p.detach().clone() for p in engine.module.parameters()]


def uneven(folder: Path) -> None:
    """Three rows on two processes: it does not matter whose pass counts nothing, nor that there is one."""
    for deepspeed in ("zero1", "zero3"):
        config = config_for(folder, deepspeed, optimizer=ADAMW)
        found = []
        for alone in (0, 1):  # the process with one row
            engine, results = new_engine(config), []
            step = TrainStep(engine, VOCABULARY, device=torch.device("cpu"))
            for index in range(3):
                rows = [row_of(index, row) for row in range(3)]
                own = rows[2:] if dist.get_rank() == alone else rows[:2]
                idle = 2 - len(own)
                batch = StepBatch(index, 0, tuple(own + own[:idle]), (2, 4, 4), 0, 3, 0, 0, idle)
                results.append(step(batch, lr=LR, data_wait=0.0))
            found.append([(result.loss, result.grad_norm, result.tokens) for result in results])
        assert np.allclose(found[0], found[1], rtol=1e-5), (deepspeed, found)
        module = LossModule(new_engine(config_for(folder, "zero0")).module.decoder, VOCABULARY)
        sums, counts = zip(*(module(row_of(0, row), 2)[1:] for row in range(3)), strict=True)
        plain = float(torch.stack(sums).sum() / torch.stack(counts).sum())
        assert abs(plain - found[0][0][0]) < 1e-5, (deepspeed, plain, found)


def poison(engine: Engine, *, gradient: bool) -> Any:
    """Spoil process 0 alone: its gradients under a finite loss, or its loss over finite gradients; returns the end."""
    if dist.get_rank():
        return lambda: None

    def spoil(module: Any, inputs: Any, out: Any) -> Any:
        loss, sums, counts = out
        return (loss * float("nan"), sums, counts) if gradient else (loss, sums * float("inf"), counts)

    return engine.module.register_forward_hook(spoil).remove


def skip(folder: Path) -> None:
    """A step with an infinite loss, or with NaN gradients under a finite one, changes nothing, on any stage."""
    cases = [("zero0", "fp32", "cpu"), ("zero1", "fp32", "cpu"), ("zero2", "fp32", "cpu"), ("zero3", "fp32", "cpu")]
    cases += [("zero1", "bf16", "cpu"), ("zero1", "bf16", "gpu"), ("zero2", "bf16", "gpu"), ("zero3", "bf16", "gpu")]
    for deepspeed, precision, device in cases:
        for optimizer in (ADAMW, MUON):
            if optimizer.kind == "muon" and (deepspeed == "zero3" or (deepspeed, device) == ("zero2", "gpu")):
                continue
            config = config_for(folder, deepspeed, precision=precision, device=device, optimizer=optimizer)
            where = (deepspeed, precision, device, optimizer.kind)
            engine, unharmed = new_engine(config), new_engine(config)
            begin = losses(train(engine, config, 0, 2))
            for gradient in (False, True):
                before = everything(engine)
                end = poison(engine, gradient=gradient)
                (result,) = train(engine, config, 2, 3)
                end()
                assert result.skipped, where
                assert not math.isfinite(result.grad_norm), where
                assert math.isfinite(result.loss) is gradient, where
                after = everything(engine)
                assert len(after) == len(before), where
                assert all(map(torch.equal, before, after)), where
            onward = train(engine, config, 3, 5)
            assert not any(result.skipped for result in onward), where
            assert begin == losses(train(unharmed, config, 0, 2)), where
            assert losses(onward) == losses(train(unharmed, config, 3, 5)), where


def agree(folder: Path) -> None:
    """All stages train alike: to rounding where parameters are float32, ZeRO-3 with every tensor divided among them."""
    for precision, device, stages, tolerance in (
        ("fp32", "cpu", (0, 1, 2, 3), 1e-5),
        ("bf16", "cpu", (0, 1, 2, 3), 0.02),
        ("bf16", "gpu", (1, 2, 3), 0.02),
    ):
        curves = []
        for stage in stages:
            config = config_for(folder, f"zero{stage}", precision=precision, device=device, optimizer=ADAMW)
            curves.append(losses(train(new_engine(config), config, 0, 8)))
        worst = max(abs(a - b) for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True))
        print(f"AGREE {precision} {device}: {worst:.2g}")  # noqa: T201
        assert worst < tolerance, (precision, device, curves)
        assert curves[0][-1] < curves[0][0] - 0.5


def write(folder: Path, deepspeed: str, precision: str, device: str, kind: str) -> None:
    """Four steps and a checkpoint, then four more, whose losses are kept beside it."""
    config = config_for(folder, deepspeed, precision=precision, device=device, optimizer=optimizer_named(kind))
    engine = new_engine(config)
    begun = losses(train(engine, config, 0, 4))
    save_engine(engine, folder)
    expected = begun + losses(train(engine, config, 4, 8))
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(expected))


def resume(folder: Path, deepspeed: str, precision: str, device: str, kind: str, tolerance: str) -> None:
    """The other four from the checkpoint, on another engine that knows nothing of the first."""
    config = config_for(folder, deepspeed, precision=precision, device=device, optimizer=optimizer_named(kind))
    engine = new_engine(config)
    load_engine(engine, EngineFiles(folder / "engine"))
    found = losses(train(engine, config, 4, 8))
    expected = json.loads((folder / "losses.json").read_text())[4:]
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert worst <= float(tolerance), (worst, found, expected)


def average(folder: Path) -> None:
    """The average of the weights is what the definition says, on every stage, and survives a resume."""
    ema = EmaConfig(decay=0.9, start=1)
    for stage in (0, 1, 2, 3):
        config = config_for(folder, f"zero{stage}", optimizer=ADAMW, ema=ema)
        engine, expected = new_engine(config), None
        for step in range(4):
            train(engine, config, step, step + 1)
            update_average(engine, ema, step=step)
            weights = [flat.detach().clone() for flat, _ in master_weights(engine)]
            if step >= ema.start:
                expected = (
                    weights if expected is None else [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)]
                )
        own = folder / f"average-{stage}"
        save_engine(engine, own)
        resumed = new_engine(config)
        load_engine(resumed, EngineFiles(own / "engine"))
        for each in (engine, resumed):
            found = [optimizer_state(each)[flat]["ema"] for flat, _ in master_weights(each)]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        forget_average(resumed)  # as a fork without an average does
        assert losses(train(resumed, config, 4, 5)) == losses(train(engine, config, 4, 5))
        save_engine(resumed, folder / f"forgotten-{stage}")
        files = EngineFiles(folder / f"forgotten-{stage}" / "engine")
        assert not any("ema" in files.keys(name) for name in files.shapes)


def text(folder: Path) -> None:
    """A worker whose rows have no caption takes part in reducing the gradients of the text rows, on every stage."""
    curves = []
    for stage in (0, 1, 2, 3):
        config = config_for(folder, f"zero{stage}", optimizer=replace(ADAMW, text_loss_weight=0.5))
        step, results = TrainStep(new_engine(config), VOCABULARY, device=torch.device("cpu")), []
        for batch in batches(0, 3):
            if dist.get_rank():
                ids, layout = build_sequence(VOCABULARY, [], np.full((2, 4, 4), 3), fps=12.0, drop_text=True)
                masked = sample_masked_positions(layout, MaskConfig(), torch.Generator().manual_seed(0))
                batch = replace(batch, micro_batches=(PackedBatch(ids, masked, (layout,)),) * 2)
            results.append(step(batch, lr=LR, data_wait=0.0))
        curves.append(losses(results))
    assert all(abs(a - b) < 1e-5 for curve in curves[1:] for a, b in zip(curves[0], curve, strict=True)), curves


def full_disk(folder: Path) -> None:
    """A worker that cannot write its file has the checkpoint left out; all go on, and the next one is written."""
    for stage in (0, 1, 3):
        config, own = config_for(folder, f"zero{stage}", optimizer=ADAMW), folder / f"disk-{stage}"
        engine, told = new_engine(config), []
        train(engine, config, 0, 1)
        writer = CheckpointWriter(
            uri=str(own / "store"),
            attempt="attempt-00001",
            options=CheckpointConfig(scratch=str(own / "scratch"), upload="sync"),
            device=torch.device("cpu"),
            files={},
            tell=lambda kind, told=told, **values: told.append((kind, values)),
        )
        place = LoopState(step=1, num_workers=dist.get_world_size(), identity_hash="x")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == (0 if stage == 0 else 1):  # of ZeRO-0, process 0 writes all
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, no_limit[1]))
        written = writer.save(engine, place, ["{}"], wait=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        assert not written, stage
        assert find_checkpoints(str(own / "store")) == []
        assert list(writer.scratch.folder.glob("step-*")) == []
        if dist.get_rank() == 0:
            ((kind, said),) = told
            assert kind == "warning", kind
            assert "the checkpoint of step 1 is left out" in said["message"]
        train(engine, config, 1, 2)
        writer.close()


def unwritable(folder: Path) -> None:
    """Whatever one worker cannot write, or bring to the store, has the checkpoint left out, and nothing of it stays."""
    config = config_for(folder, "zero1", optimizer=ADAMW)
    engine, told, no_limit = new_engine(config), [], resource.getrlimit(resource.RLIMIT_FSIZE)
    train(engine, config, 0, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    put = saving._put

    def cut_short(file: Path, target: str, digest: str) -> None:
        put(file, target, digest)
        raise OSError(errno.ENOSPC, "no space left", target)

    store = str(folder / "store")
    for number, (uri, files, limit) in enumerate(
        [(store, {"large.json": "x" * 20_000_000}, 10_000_000), ("nowhere://store", {}, None), (store, {}, None)]
    ):
        writer = CheckpointWriter(
            uri=uri,
            attempt="attempt-00001",
            options=CheckpointConfig(scratch=str(folder / "scratch"), upload="sync"),
            device=torch.device("cpu"),
            files=files,
            tell=lambda kind, **values: told.append(values["message"]),
        )
        if dist.get_rank() == 1 and number == 2:
            saving._put = cut_short
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or no_limit[0], no_limit[1]))
        place = LoopState(step=1, num_workers=2, identity_hash="x")
        assert not writer.save(engine, place, ["{}"], wait=False), number
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
        assert list(writer.scratch.folder.glob("step-*")) == []
        assert len(told) == (0 if dist.get_rank() else number + 1)
        dist.barrier()
        assert list(Path(store).glob("attempt-*/step-*/*")) == [], number
        writer.close()


def room(folder: Path) -> None:
    """The space that a node needs is told about right before anything is written."""
    for stage in (1, 2, 3):
        config, own = config_for(folder, f"zero{stage}", optimizer=ADAMW), folder / f"room-{stage}"
        engine = new_engine(config)
        train(engine, config, 0, 1)
        save_engine(engine, own)
        dist.barrier()
        written = sum(file.stat().st_size for file in own.rglob("*") if file.is_file())
        expected = saving._expected_size(engine, dist.get_rank())
        most = torch.tensor(float(expected))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        print(f"ROOM {stage}: {written} written, {most.item():.0f} expected")  # noqa: T201
        assert 0.9 * written < most.item() < 1.15 * written, (stage, written, most)


def fetch(folder: Path, uri: str) -> None:
    """Both processes read one copy of a checkpoint, in the scratch folder; it is gone afterwards."""
    scratch = Scratch(str(folder / "scratch"))
    copies: list[Any] = [None] * 2
    with folder_of_node(uri, scratch) as copy:
        assert (copy / "state.json").is_file()
        dist.all_gather_object(copies, str(copy))
    dist.barrier()
    assert copies[0] == copies[1]
    assert copy.is_relative_to(folder / "scratch")
    assert not copy.exists()
    scratch.remove()


def optimizer_named(kind: str) -> OptimizerConfig:
    return MUON if kind == "muon" else ADAMW


def products(_: Path) -> None:
    """Muon iterates in what the CPU multiplies in, once the process is prepared."""
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5

    found = zeropower_via_newtonschulz5(torch.randn(4, 4), steps=1).dtype
    assert found == (torch.bfloat16 if has_bf16_products() else torch.float32), found


_ALL = (skip, agree, uneven, average, text, full_disk, unwritable, room, products, fetch, write, resume)
SCENARIOS = {each.__name__: each for each in _ALL}


def main(scenario: str, folder: Path, *arguments: str) -> None:
    dist.init_process_group("gloo")
    prepare_process(torch.device("cpu"), threads=1)
    for name in scenario.split("+"):
        SCENARIOS[name](folder, *arguments)
    dist.destroy_process_group()
    os._exit(0)  # torch's own end, after that, aborts one process in ten that had gloo groups


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
