"""Weights and optimizer state in DeepSpeed's files, tensor by tensor: into any engine, or out to a model folder.

A worker's file holds pieces of flattened tensors, cut according to ZeRO stage and number of workers. Here they are put
together again by name and position, so a run goes on under another stage, on another number of workers, or with other
hyperparameters. Files are mapped and not read whole: what is copied is what is asked for.
"""

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.engine import Engine

ENGINE_DIR = "engine"
MASTER = "fp32"  # the weights that the optimizer updates
MOMENTUM = "momentum_buffer"  # of Muon
EMA = "ema"  # their moving average, where a run keeps one
ORDER = "optimizer_parameters"  # in DeepSpeed's client state: names in the order of the optimizer's groups


class EngineFiles:
    """What the files of an engine hold: shapes by tensor, and values by tensor and key (MASTER, exp_avg, ...).

    Raises:
        ValueError: if they are of an engine that is not known.
    """

    def __init__(self, folder: Path, *, order: Sequence[str] = ()) -> None:
        """``order`` names the optimizer's tensors where the files of ZeRO-0 do not, as older programs wrote them."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[Tensor]] = {}  # 1-D, in their order
        self._scalars: dict[tuple[str, str], float] = {}
        self._rows: dict[str, tuple[str, int]] = {}  # tensors that are rows of another, from a position on
        models = [_load(path) for path in sorted(folder.glob("*model_states.pt"))]
        optimizers = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*optim_states.pt")]
        if not models:
            raise ValueError(f"{folder} holds no engine's files")
        if optimizers and "fp32_flat_groups" in optimizers[0]:
            self._read_stage3([_load(path) for path in _by_rank(folder, "zero_pp_rank_*model_states.pt")], optimizers)
        elif optimizers:
            self._read_stages12(models[0], optimizers)
        else:
            self._read_stage0(models[0], order)

    def keys(self, name: str) -> set[str]:
        """Under which keys a tensor has values."""
        found = {key for held, key in self._pieces if held == name}
        return found | self.keys(self._rows[name][0]) if name in self._rows else found

    def split_head(self, num_text: int) -> None:
        """Take the head for what it is in the model: rows of text and rows of codes.

        The module's state has it whole; the optimizer of older programs has, too.
        """
        for whole in [name for name in self.shapes if name.endswith("lm_head.weight")]:
            rows, width = self.shapes.pop(whole)
            prefix = whole.removesuffix("weight")
            for part, start, stop in (("text", 0, num_text), ("visual", num_text, rows)):
                if prefix + part not in self.shapes and stop > start:
                    self.shapes[prefix + part] = (stop - start, width)
                    self._rows[prefix + part] = (whole, start * width)

    def scalar(self, name: str, key: str) -> float | None:
        """A number of the optimizer about a tensor, such as its count of steps."""
        held = name if (name, key) in self._scalars else self._rows.get(name, (name,))[0]
        return self._scalars.get((held, key))

    def read(self, name: str, key: str = MASTER, *, start: int = 0, numel: int | None = None) -> Tensor:
        """Values of the flattened tensor from ``start`` on; by default all of them, and then in its shape.

        Raises:
            ValueError: if the files do not hold so many.
        """
        total = math.prod(self.shapes[name])
        wanted = total - start if numel is None else numel
        found, position, held = [], 0, name
        if (name, key) not in self._pieces:
            held, offset = self._rows[name]
            position = -offset
        for piece in self._pieces[held, key]:
            low, high = max(start, position), min(start + wanted, position + len(piece))
            if low < high:
                found.append(piece[low - position : high - position])
            position += len(piece)
        values = torch.cat(found) if len(found) != 1 else found[0]
        if len(values) != wanted:
            raise ValueError(f"{self.folder} holds {position} values of {name} ({key}), {total} were expected")
        return values.view(self.shapes[name]) if numel is None and not start else values

    def _add(self, name: str, key: str, values: Any, start: int, numel: int, whole: int) -> None:
        """A piece of a flattened group's state; what is not as long as the group is a number about all of it."""
        if isinstance(values, Tensor) and values.ndim and values.numel() >= whole:
            self._pieces.setdefault((name, key), []).append(values.reshape(-1)[start : start + numel])
        elif not isinstance(values, Tensor) or values.numel() == 1:
            self._scalars[name, key] = float(values)

    def _read_stage0(self, model: dict[str, Any], order: Sequence[str]) -> None:
        for name, tensor in model["module"].items():
            self.shapes[name] = tuple(tensor.shape)
            self._pieces[name, MASTER] = [tensor.reshape(-1)]
        optimizer = model["optimizer"]
        if "param_groups" not in optimizer:
            raise ValueError("its optimizer is that of ZeRO-0 in bf16, which is not supported any more")
        names = model.get(ORDER) or order
        for index, state in optimizer["state"].items():
            for key, values in state.items():
                numel = values.numel() if isinstance(values, Tensor) else 1
                self._add(names[index], key, values, 0, numel, numel)

    def _read_stages12(self, model: dict[str, Any], optimizers: Sequence[dict[str, Any]]) -> None:
        for shapes in model["param_shapes"]:
            self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
        for optimizer in optimizers:
            state = optimizer["base_optimizer_state"]["state"]
            masters = optimizer["single_partition_of_fp32_groups"]
            for group, fragments in enumerate(optimizer["param_slice_mappings"]):
                whole, kept = masters[group].numel(), dict(state.get(group, {}))
                if self._holds_whole_tensors(kept.get(MOMENTUM), fragments):
                    self._add_whole(kept.pop(MOMENTUM), fragments)
                for name, place in fragments.items():
                    for key, values in {MASTER: masters[group], **kept}.items():
                        self._add(name, key, values, place.start, place.numel, whole)
        self._add_frozen(model["module"])

    def _add_frozen(self, module: dict[str, Tensor]) -> None:
        """What of the module's state the optimizer does not know."""
        for name, tensor in module.items():
            if name not in self.shapes:
                self.shapes[name] = tuple(tensor.shape)
                self._pieces[name, MASTER] = [tensor.reshape(-1)]

    def _holds_whole_tensors(self, momentum: Tensor | None, names: Collection[str]) -> bool:
        """Whether it is as ZeRO-1 and 2 keep Muon's: all of each tensor that a worker has a part of, one after another.

        Where that is as long as the worker's own part, both are the same.
        """
        return momentum is not None and momentum.numel() == sum(math.prod(self.shapes[name]) for name in names)

    def _add_whole(self, momentum: Tensor, names: Collection[str]) -> None:
        sizes = [math.prod(self.shapes[name]) for name in names]
        for name, values in zip(names, momentum.split(sizes), strict=True):
            self._pieces[name, MOMENTUM] = [values]

    def _read_stage3(self, models: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> None:
        for optimizer in optimizers:
            state = optimizer["optimizer_state_dict"]["state"]
            for group, shapes in enumerate(models[0]["param_shapes"]):
                master, offset = optimizer["fp32_flat_groups"][group], 0
                for name, shape in shapes.items():
                    self.shapes[name] = tuple(shape)
                    part = -(-math.prod(shape) // len(optimizers))
                    for key, values in {MASTER: master, **state.get(group, {})}.items():
                        self._add(name, key, values, offset, part, master.numel())
                    offset += part
        for model in models:
            for name, piece in (model.get("frozen_param_fragments") or {}).items():
                self.shapes[name] = tuple(model["frozen_param_shapes"][name])
                self._pieces.setdefault((name, MASTER), []).append(piece.reshape(-1))
        self._add_frozen({name: tensor for name, tensor in models[0]["module"].items() if tensor.numel()})


def _load(path: Path) -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the files name classes of DeepSpeed, which else warns of its guess
    # Pickles of our own checkpoints, whose hashes were compared; a checkpoint of a stranger is not to be resumed from.
    return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=False))


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files of all workers, in the order of the workers."""
    return sorted(folder.glob(pattern), key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))


def save_engine(engine: Engine, folder: Path) -> None:
    """Write an engine's files to ``folder/engine``: each worker its own. Every worker must call it.

    Raises:
        OSError: if this worker could not write one of its own; only after all have come to the end together.
    """
    client: dict[str, Any] = {}
    if engine.zero_optimization_stage() == 0:
        client[ORDER] = [fragment.name for _, fragments in master_weights(engine) for fragment in fragments]
    files, failed = engine.checkpoint_engine, []
    write = files.save

    def write_or_note(*arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, RuntimeError) as error:  # torch.save raises either where there is no space
            failed.append(error)

    files.save = write_or_note  # the others wait for this worker where DeepSpeed has its barriers
    engine._copy_recovery_script = lambda _: None  # not needed, and it could fail likewise
    try:
        engine.save_checkpoint(str(folder), tag=ENGINE_DIR, client_state=client, save_latest=False)
    finally:
        files.save = write
    if failed:
        raise OSError(f"{folder}: {failed[0]}") from failed[0]


def older_order(engine: Engine) -> list[str]:
    """The optimizer's tensors in the order of the files of ZeRO-0 that an older program wrote, with a head of one."""
    if engine.zero_optimization_stage():
        return []
    names = [fragment.name for _, fragments in master_weights(engine) for fragment in fragments]
    return [name.replace("lm_head.visual", "lm_head.weight") for name in names if not name.endswith("lm_head.text")]


@dataclass(frozen=True)
class Fragment:
    """A piece of a tensor in one of the flat tensors a worker's optimizer updates."""

    name: str
    start: int  # in the flattened tensor
    offset: int  # in the optimizer's flat tensor
    numel: int


def master_weights(engine: Engine) -> Iterator[tuple[Tensor, list[Fragment]]]:
    """The float32 tensors that this worker's optimizer updates, and what is in them. In place is where they may change.

    Where the optimizer has moments of a tensor, they are laid out as it is.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, [Fragment(names[parameter], 0, 0, parameter.numel())]
    elif stage == 3:
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            fragments, offset = [], 0
            for parameter in group:
                part = parameter.ds_tensor.ds_numel
                start = dist.get_rank() * part
                numel = max(0, min(part, parameter.ds_numel - start))
                fragments.append(Fragment(optimizer.param_names[parameter], start, offset, numel))
                offset += part
            yield flat, fragments
    else:
        plain = hasattr(optimizer, "single_partition_of_fp32_groups")
        flats = optimizer.single_partition_of_fp32_groups if plain else optimizer.fp32_groups_flat_partition
        for flat, group in zip(flats, optimizer.bit16_groups if plain else optimizer.bf16_groups, strict=True):
            fragments = []
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    place = mapping.hp_fragment_address
                    start = mapping.lp_fragment_address.start
                    fragments.append(Fragment(optimizer.param_names[parameter], start, place.start, place.numel))
            yield flat, fragments


def optimizer_state(engine: Engine) -> Any:
    """The state of the optimizer below DeepSpeed's, by the tensors of :func:`master_weights`."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer).state


def load_engine(engine: Engine, files: EngineFiles) -> None:
    """Set an engine's weights and optimizer state to what files hold. Every worker must call it.

    Hyperparameters stay as the engine has them. Moments that another kind of optimizer kept are not taken over: those
    of the tensors concerned begin anew.

    Raises:
        ValueError: if the files have other tensors than the engine, or other shapes.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    files.split_head(engine.module.decoder.lm_head.num_text)
    _check_shapes(engine, files)
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    state = optimizer_state(engine)
    for flat, fragments in master_weights(engine):
        _fill(flat.data, files, MASTER, fragments)
        found = _read_state(engine, files, flat, fragments)
        if found:
            state[flat] = found
    _load_untrained(engine, files)
    if stage == 3:
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()


def _read_state(engine: Engine, files: EngineFiles, flat: Tensor, fragments: Sequence[Fragment]) -> dict[str, Any]:
    """The optimizer's state of one flat tensor; none where it is not there for all that is in it."""
    names = [fragment.name for fragment in fragments]
    common = set.intersection(*(files.keys(name) for name in names)) - {MASTER} if names else set()
    group = next(g for g in _base_groups(engine) if any(flat is p for p in g["params"])) if common else {}
    wanted = {MOMENTUM} if group.get("use_muon") else {"exp_avg", "exp_avg_sq"}
    if not wanted <= common:
        return {}
    found: dict[str, Any] = {}
    for key in (wanted | {EMA}) & common:
        if key == MOMENTUM and hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
            found[key] = torch.cat([files.read(name, key).reshape(-1) for name in names])  # as it keeps them
            continue
        found[key] = _fill(torch.zeros_like(flat), files, key, fragments)
    steps = files.scalar(names[0], "step")
    if steps is not None and not group.get("use_muon"):
        base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        found["step"] = torch.tensor(steps) if isinstance(base, torch.optim.AdamW) else int(steps)
    return found


def _base_groups(engine: Engine) -> list[dict[str, Any]]:
    """The optimizer's groups with the flat tensors of this worker in them."""
    optimizer = engine.optimizer
    groups: list[dict[str, Any]] = getattr(optimizer, "optimizer", optimizer).param_groups
    if engine.zero_optimization_stage() < 3:
        return groups
    flats: list[list[Tensor]] = [[] for _ in groups]  # ZeRO-3 puts them there for the update only
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        flats[optimizer.sub_group_to_group_id[index]].append(flat)
    return [{**group, "params": held} for group, held in zip(groups, flats, strict=True)]


def _fill(flat: Tensor, files: EngineFiles, key: str, fragments: Sequence[Fragment]) -> Tensor:
    for fragment in fragments:
        if fragment.numel:
            values = files.read(fragment.name, key, start=fragment.start, numel=fragment.numel)
            flat.view(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(values)
    return flat


@torch.no_grad()
def _load_untrained(engine: Engine, files: EngineFiles) -> None:
    """Set what no optimizer knows: frozen parameters, and buffers."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() < 3:
            parameter.copy_(files.read(name))
            continue
        local, start = parameter.ds_tensor, dist.get_rank() * parameter.ds_tensor.ds_numel
        numel = max(0, min(local.ds_numel, math.prod(files.shapes[name]) - start))
        if numel:
            local.data.view(-1)[:numel].copy_(files.read(name, start=start, numel=numel))
    for name, buffer in engine.module.named_buffers():
        if name in files.shapes:
            buffer.copy_(files.read(name))


def _check_shapes(engine: Engine, files: EngineFiles) -> None:
    ours = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    ours |= {name: tuple(b.shape) for name, b in engine.module.named_buffers() if name in files.shapes}
    different = [name for name in ours.keys() | files.shapes.keys() if ours.get(name) != files.shapes.get(name)]
    if different:
        name = min(different)
        raise ValueError(
            f"{files.folder} does not fit this model: {name} has shape {files.shapes.get(name)} there, "
            f"{ours.get(name)} here, and so {len(different)} tensors in all"
        )
