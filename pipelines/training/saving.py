"""How all workers write a checkpoint: to a scratch folder each, then to storage, beside the training if it may be so.

A checkpoint that cannot be written, for want of space or of a store, is left out with a warning, on all workers alike;
training goes on, and the next interval tries again.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from pipelines import storage
from pipelines.errors import UserError
from pipelines.training.checkpoints import STATE_FILE, LoopState, checksum, list_name, write_record
from pipelines.training.config import CheckpointConfig
from pipelines.training.engine import Engine
from pipelines.training.engine_files import ENGINE_DIR, master_weights, optimizer_state, save_engine
from pipelines.training.scratch import Scratch

logger = logging.getLogger(__name__)

_SPARE = 1.05  # of the space that is counted on, for what is not counted
_ATTEMPTS = 5  # at writing a file; the store's own tries come on top
_WAIT = wait_exponential(multiplier=1.0, max=20.0)  # seconds between them


class CheckpointWriter:
    """Writes this worker's part of checkpoints. Every worker must make the same calls."""

    def __init__(
        self,
        *,
        uri: str,
        attempt: str,
        options: CheckpointConfig,
        device: torch.device,
        files: dict[str, str],
        tell: Callable[..., None],
    ) -> None:
        """``uri`` is the run's storage folder, ``attempt`` the folder in it for this driver's checkpoints.

        ``files`` are small ones that go into every checkpoint: name and content. ``tell`` takes what the driver should
        hear, in rank 0: a kind and values.
        """
        self.uri, self.attempt = uri, attempt
        self.scratch = Scratch(options.scratch)
        self.asynchronous = options.upload == "async"
        self.device = device
        self.files = files
        self.tell = tell
        self.rank = dist.get_rank()
        self._pool = ThreadPoolExecutor(1)
        self._pending: tuple[Future[None], int, str, Path] | None = None  # with step, target and folder

    def save(self, engine: Engine, state: LoopState, lines: Sequence[str], *, wait: bool) -> bool:
        """Write a checkpoint; with ``wait``, it is in storage afterwards. Whether it was written, or is being so.

        ``lines`` are those of the record since the last one, up to ``state.step``; rank 0's are used.
        """
        self.settle()
        step, folder = state.step, self.scratch.folder / f"step-{state.step:08d}"
        needed = _expected_size(engine, self.rank)
        if not self._all(self._makes_room(folder) > needed * _SPARE):
            return self._leave_out(
                step, folder, f"{self.scratch.root} has not the {needed / 1e9:.2f} GB of space it needs"
            )
        error: Exception | None = None
        try:
            save_engine(engine, folder)
            if self.rank == 0:
                write_record(self.uri, step - len(lines) + 1, lines)
                for name, content in {STATE_FILE: json.dumps(asdict(state)), **self.files}.items():
                    (folder / name).write_text(content, encoding="utf-8")
        except (OSError, UserError) as raised:
            error = raised
        if not self._all(error is None):
            cause = error or "by another worker"
            return self._leave_out(step, folder, f"{self.scratch.root} or {self.uri} cannot be written to ({cause})")
        target = storage.join(self.uri, self.attempt, f"step-{step:08d}-{self._token()}")
        self._pending = (self._pool.submit(self._upload, folder, target), step, target, folder)
        return self.settle() if wait or not self.asynchronous else True

    def _makes_room(self, folder: Path) -> int:
        """Make a checkpoint's folder; bytes that may be written, 0 where it cannot be made."""
        try:
            (folder / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
            return self.scratch.free()
        except OSError:
            return 0

    def poll(self) -> None:
        """Between steps: report an upload that has ended."""
        if self._pending is not None and self._all(self._pending[0].done()):
            self.settle()

    def settle(self) -> bool:
        """Wait for the upload under way, if there is one, and report it; whether the last one succeeded."""
        if self._pending is None:
            return True
        upload, step, target, folder = self._pending
        self._pending = None
        error = upload.exception()
        if not self._all(error is None):
            if self.rank == 0:  # what has been written would keep a full disk full
                with suppress(OSError, UserError):
                    storage.remove(target)
            return self._leave_out(step, folder, f"{target} cannot be written to ({error or 'by another worker'})")
        shutil.rmtree(folder, ignore_errors=True)
        place = ray.train.get_context().get_storage()
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(f"{place.experiment_fs_path}/{target.rsplit('/', 1)[1]}", place.storage_filesystem),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,  # it is there
        )
        if self.rank == 0:
            self.tell("checkpoint", step=step)
        return True

    def close(self) -> None:
        """At the end: nothing of it stays in the scratch folder."""
        self._pool.shutdown()
        self.scratch.remove()

    def _upload(self, folder: Path, target: str) -> None:
        """Bring a folder to storage, and the list of its files after it."""
        files = {}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(file.relative_to(folder))
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = file.stat().st_size
            for attempt in Retrying(
                stop=stop_after_attempt(_ATTEMPTS), wait=_WAIT, retry=retry_if_exception(_may_pass), reraise=True
            ):
                with attempt:
                    _put(file, storage.join(target, name), digest)
            files[name] = {"size": size, "sha256": digest}
        storage.write_bytes_atomic(storage.join(target, list_name(self.rank)), json.dumps(files).encode())

    def _token(self) -> str:
        """Eight hex digits, the same on all workers."""
        token = torch.tensor([secrets.randbits(32)], dtype=torch.int64, device=self.device)
        dist.broadcast(token, src=0)
        return f"{token.item():08x}"

    def _all(self, condition: bool) -> bool:
        """Whether it holds on all workers."""
        holds = torch.tensor([float(condition)], device=self.device)
        dist.all_reduce(holds, op=dist.ReduceOp.MIN)
        return bool(holds.item())

    def _leave_out(self, step: int, folder: Path, reason: str) -> bool:
        """Warn of a checkpoint that cannot be written; False."""
        shutil.rmtree(folder, ignore_errors=True)
        message = (
            f"the checkpoint of step {step} is left out: {reason}; training goes on, the next interval tries again"
        )
        logger.warning(message)
        if self.rank == 0:
            self.tell("warning", message=message)
        return False


def _expected_size(engine: Engine, rank: int) -> int:
    """Bytes of a checkpoint on this node: what its workers' optimizers keep, and in rank 0's files the module."""
    state = optimizer_state(engine)
    part = [value for flat, _ in master_weights(engine) for value in (flat, *state[flat].values())]
    module = [*engine.module.parameters(), *engine.module.buffers()] if rank == 0 else []
    return _num_bytes(part) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + _num_bytes(module)


def _num_bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES)


def _put(file: Path, target: str, digest: str) -> None:
    """Copy a file to storage and read it back.

    Raises:
        OSError: if it cannot be written, or is not there as it was written.
    """
    fs, path = storage.filesystem(target)
    if storage.is_local(target):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, Path(path).open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
    else:
        fs.put_file(str(file), path)
    if checksum(target) != digest:
        raise OSError(errno.EIO, "is not there as it was written", target)
