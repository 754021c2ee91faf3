"""Model folders out of checkpoints: any kept one, of any ZeRO stage, tensor by tensor, without starting a training."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lumos.checkpoint import CONFIG_FILE, is_model_file, save_checkpoint
from lumos.config import SamplingConfig
from lumos.decoder import Decoder
from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import s3
from pipelines.training.checkpoints import (
    MODEL_FILE,
    TEXT_TOKENIZER_FILE,
    ModelFile,
    StoredCheckpoint,
    damaged_files,
    find_checkpoints,
    open_checkpoint,
)
from pipelines.training.engine_files import EMA, ENGINE_DIR, MASTER, EngineFiles
from pipelines.training.mirror import remove_stale
from pipelines.training.output import EMA_EXPORT, EXPORT, RUN_FILE
from pipelines.training.scratch import local_folder

ExportDtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MODULE = "decoder."  # before the names of the model's tensors in an engine
_HEAD = _MODULE + "lm_head"


class _Weights(Mapping[str, Tensor]):
    """The tensors of a decoder under the authors' keys, each read when it is asked for."""

    def __init__(self, files: EngineFiles, dtype: torch.dtype, *, ema: bool) -> None:
        self.files, self.dtype, self.ema = files, dtype, ema
        parts = {f"{_HEAD}.text", f"{_HEAD}.visual"}
        self.names = [name.removeprefix(_MODULE) for name in files.shapes if name not in parts]
        self.head = sorted(parts & files.shapes.keys())  # text before visual
        self.names.append(f"{_HEAD}.weight".removeprefix(_MODULE))

    def __getitem__(self, name: str) -> Tensor:
        full = _MODULE + name
        if full == f"{_HEAD}.weight":
            return torch.cat([self._read(part) for part in self.head])
        return self._read(full)

    def _read(self, name: str) -> Tensor:
        key = EMA if self.ema and EMA in self.files.keys(name) else MASTER
        return self.files.read(name, key).to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def export(
    stored: StoredCheckpoint,
    target: Path,
    *,
    dtype: ExportDtype = "fp32",
    ema: bool = False,
    scratch: str | None = None,
    sampling: SamplingConfig | None = None,
) -> None:
    """Write the model of a checkpoint to a folder, complete or not at all; with ``ema``, the average of its weights.

    ``sampling`` is what the folder recommends; none: what the run's config does.

    A checkpoint that is in a store is fetched to a folder below ``scratch`` first. The last one of an older program
    holds the finished model, which is copied as it is.

    Raises:
        UserError: if the checkpoint does not say of which model it is, or has no such average.
    """
    if stored.state.exported and not ema:
        with local_folder(storage.join(stored.uri, "export"), scratch) as folder:
            _copy(folder, target, sampling)
        return
    with local_folder(stored.uri, scratch) as folder:
        model = read_model_file(stored)
        files = EngineFiles(folder / ENGINE_DIR)
        files.split_head(model.config.visual_start)
        if ema and not any(EMA in files.keys(name) for name in files.shapes):
            raise UserError(f"{stored.uri} has no average of the weights: its run has ema: null")
        with torch.device("meta"):
            decoder = Decoder(model.config)
        text_tokenizer = (folder / TEXT_TOKENIZER_FILE).read_text(encoding="utf-8")
        weights = _Weights(files, _DTYPES[dtype], ema=ema)
        info = model.info if sampling is None else replace(model.info, sampling=sampling)
        save_checkpoint(target, decoder, model.vocabulary, state=weights, info=info, text_tokenizer=text_tokenizer)


def export_to(stored: StoredCheckpoint, target: str, *, dtype: ExportDtype = "fp32", ema: bool = False) -> None:
    """As :func:`export`, to a local folder or into a store, where a model counts once its config is there.

    Raises:
        UserError: as there, or if the place holds something else, or the model that a run made of itself.
    """
    _check_not_of_a_run(target)
    if storage.is_local(target):
        _check_folder(Path(storage.filesystem(target)[1]))
        export(stored, Path(storage.filesystem(target)[1]), dtype=dtype, ema=ema)
        return
    names, mark = storage.list_names(target), storage.join(target, CONFIG_FILE)
    if CONFIG_FILE not in names and not all(map(is_model_file, names)):  # all: one whose upload was cut off
        raise UserError(f"{target} holds files that are not a checkpoint: name another place")
    with tempfile.TemporaryDirectory(prefix="lumos-export-") as folder:
        model = Path(folder) / "model"
        export(stored, model, dtype=dtype, ema=ema)
        storage.remove(mark)
        remove_stale(target, model)
        for path in sorted(model.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            fs, there = storage.filesystem(storage.join(target, path.name))
            fs.put_file(str(path), there)


def _check_not_of_a_run(target: str) -> None:
    """Refuse the folder in which a training left its finished model, since that would no longer be what it made."""
    place = str(Path(storage.filesystem(target)[1]).resolve()) if storage.is_local(target) else target.rstrip("/")
    run, _, name = place.rpartition("/")
    files = (storage.join(run, RUN_FILE), storage.join(place, CONFIG_FILE))
    if name in (EXPORT, EMA_EXPORT) and all(map(storage.exists, files)):
        raise UserError(
            f"{target} is the model that the training {run} ended with, which an export would replace: name another "
            f"folder, or delete this one first"
        )


def _check_folder(folder: Path) -> None:
    """Refuse a folder that has more than a model in it, since it would be replaced as a whole."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: name a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    other = next((name for name in names if not is_model_file(name)), None)
    if other is not None:
        raise UserError(f"{folder} holds files that are not a checkpoint, such as {other}: name another folder")


def _copy(folder: Path, target: Path, sampling: SamplingConfig | None) -> None:
    if target.exists() and not (target / CONFIG_FILE).exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds files that are not a checkpoint: name another folder")
    building = target.with_name(f".{target.name}-new")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(folder, building)
    if sampling is not None:
        config = json.loads((building / CONFIG_FILE).read_text())
        section = config["lumos"]
        section["info" if "info" in section else "extra"]["sampling"] = asdict(sampling)
        (building / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)


def has_ema(stored: StoredCheckpoint) -> bool:
    """Whether a checkpoint holds an average of the weights."""
    train_config = read_model_file(stored).info.train_config
    return bool(train_config.get("ema")) and stored.state.step > train_config["ema"]["start"]


def read_model_file(stored: StoredCheckpoint) -> ModelFile:
    """Which model a checkpoint is of.

    Raises:
        UserError: if it does not say, as those of older programs.
    """
    try:
        return ModelFile.from_json(storage.read_bytes(storage.join(stored.uri, MODEL_FILE)))
    except FileNotFoundError as error:
        raise UserError(
            f"{stored.uri} has no {MODEL_FILE}, as an older lumos wrote it: continue its run with the "
            "command that began it, which writes newer checkpoints and the model"
        ) from error


def locate(where: str) -> StoredCheckpoint:
    """The checkpoint that a folder or URI is, or that RUN@STEP names; of RUN alone, the newest.

    RUN is an output folder, or a folder of checkpoints of one run.

    Raises:
        UserError: if there is none; the message names the steps that are kept.
    """
    s3.check_store(where)
    chosen = open_checkpoint(where) or _named(where)
    damaged = damaged_files(chosen)
    if damaged:
        raise UserError(f"{chosen.uri} is damaged ({', '.join(damaged)}): name another step")
    return chosen


def _named(where: str) -> StoredCheckpoint:
    """What RUN@STEP or RUN names."""
    run, at, step = where.rpartition("@")
    if not at:
        run, step = where, ""
    if step and not step.isdecimal():
        raise UserError(f"{where} names no checkpoint: give its folder, or RUN@STEP with the number of a step")
    uri = storage_of(run)
    kept = find_checkpoints(uri)
    if not kept:
        raise UserError(f"{where}: there are no checkpoints in {uri}; name a checkpoint's folder, or RUN@STEP")
    chosen = next((stored for stored in kept if not step or stored.state.step == int(step)), None)
    if chosen is None:
        steps = ", ".join(str(stored.state.step) for stored in reversed(kept))
        raise UserError(f"{where}: the checkpoint of step {step} was not kept; {run} has those of steps {steps}")
    return chosen


def storage_of(run: str) -> str:
    """Where the checkpoints of a run are, by its output folder, or by the folder they are in."""
    output = str(Path(run).expanduser().resolve()) if storage.is_local(run) else run
    file = storage.join(output, RUN_FILE)
    if storage.exists(file):
        try:
            return str(storage.read_json(file).get("storage") or storage.join(output, "checkpoints"))
        except (AttributeError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): name the folder of a checkpoint instead") from error
    return run
