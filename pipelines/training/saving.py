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
import socket
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from ray.train import Checkpoint, CheckpointUploadMode
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from pipelines import storage
from pipelines.training.checkpoints import STATE_FILE, LoopState, list_name, write_record
from pipelines.training.config import CheckpointConfig
from pipelines.training.engine import Engine
from pipelines.training.engine_files import ENGINE_DIR, master_weights, optimizer_state, save_engine

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_SPARE = 1.05  # of the space that is counted on, for what is not counted
_ATTEMPTS = 5  # at writing a file; the store's own tries come on top
_WAIT = wait_exponential(multiplier=1.0, max=20.0)  # seconds between them


class Scratch:
    """A folder of this process alone below ``root``; those that killed processes of this host left are removed."""

    def __init__(self, root: str | None) -> None:
        self.root = Path(root).expanduser() if root else Path(tempfile.gettempdir())
        self.root.mkdir(parents=True, exist_ok=True)
        # Of this host and user, for the locks of others cannot be opened.
        prefix = f"lumos-scratch-{socket.gethostname()}-{os.getuid()}-"
        with FileLock(self.root / f".{prefix}lock"):  # so that nobody takes a folder for left that is being made
            for folder in self.root.glob(f"{prefix}*"):
                self._remove_if_left(folder)
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
            self._lock = FileLock(self.folder / _LOCK)
            self._lock.acquire()  # the system lets go of it however this process ends

    @staticmethod
    def _remove_if_left(folder: Path) -> None:
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            return
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()

    def free(self) -> int:
        """Bytes that may be written."""
        return shutil.disk_usage(self.folder).free

    def remove(self) -> None:
        """At the end."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


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
        self.seconds = 0.0  # of the last upload
        self._size = 0  # of the last one, here
        self._pool = ThreadPoolExecutor(1)
        self._pending: tuple[Future[None], str, Path] | None = None

    def save(self, engine: Engine, state: LoopState, lines: Sequence[str], *, wait: bool) -> bool:
        """Write a checkpoint; with ``wait``, it is in storage afterwards. Whether it was written, or is being so.

        ``lines`` are those of the record since the last one, up to ``state.step``; rank 0's are used.
        """
        self.settle()
        folder = self.scratch.folder / f"step-{state.step:08d}"
        needed = max(self._size, _expected_size(engine, self.rank))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not self._all(self._makes_room(folder) > needed * _SPARE * here):
            shutil.rmtree(folder, ignore_errors=True)
            self._warn(state.step, f"{self.scratch.root} has not the {needed * here / 1e9:.2f} GB of space it needs")
            return False
        part, error = list(lines) if self.rank == 0 else [], None
        try:
            save_engine(engine, folder)
            write_record(self.uri, state.step - len(part) + 1, part)
        except OSError as raised:
            error = raised
        if not self._all(error is None):
            shutil.rmtree(folder, ignore_errors=True)
            self._warn(
                state.step, f"{self.scratch.root} or {self.uri} cannot be written to ({error or 'by another worker'})"
            )
            return False
        if self.rank == 0:
            for name, content in {STATE_FILE: json.dumps(asdict(state)), **self.files}.items():
                (folder / name).write_text(content, encoding="utf-8")
        self._size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        target = storage.join(self.uri, self.attempt, f"step-{state.step:08d}-{self._token()}")
        upload = self._pool.submit(self._upload, folder, target)
        self._pending = (upload, target, folder)
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
        upload, target, folder = self._pending
        self._pending = None
        error = upload.exception()
        shutil.rmtree(folder, ignore_errors=True)
        step = int(target.rsplit("step-", 1)[1].split("-")[0])
        if not self._all(error is None):
            self._warn(step, f"{target} cannot be written to ({error or 'by another worker'})")
            return False
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

    def _warn(self, step: int, reason: str) -> None:
        message = (
            f"the checkpoint of step {step} is left out: {reason}; training goes on, the next interval tries again"
        )
        logger.warning(message)
        if self.rank == 0:
            self.tell("warning", message=message)


def _expected_size(engine: Engine, rank: int) -> int:
    """Bytes of this worker's files: the weights and what the optimizer keeps of its part, and on rank 0 the module."""
    state = optimizer_state(engine)
    part = [value for flat, _ in master_weights(engine) for value in (flat, *state[flat].values())]
    module = list(engine.module.parameters()) if rank == 0 else []
    return sum(x.numel() * x.element_size() for x in [*part, *module] if isinstance(x, torch.Tensor))


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
    if storage.sha256_file(target) != digest:
        raise OSError(errno.EIO, "is not there as it was written", target)
