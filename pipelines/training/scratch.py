"""Local folders in which a node's checkpoints are made, and to which those in a store are fetched."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch.distributed as dist
from filelock import FileLock, Timeout

from pipelines import storage
from pipelines.errors import UserError

_LOCK = ".lock"


class Scratch:
    """A folder of this process alone below ``root``; those that killed processes of this host left are removed.

    Raises:
        UserError: if it cannot be made.
    """

    def __init__(self, root: str | None) -> None:
        self.root = Path(root).expanduser() if root else Path(tempfile.gettempdir())
        # Of this host and user, for the locks of others cannot be opened.
        prefix = f"lumos-scratch-{socket.gethostname()}-{os.getuid()}-"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{prefix}lock"):  # so that nobody takes a folder for left that is being made
                for folder in self.root.glob(f"{prefix}*"):
                    self._remove_if_left(folder)
                self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
                self._lock = FileLock(self.folder / _LOCK)
                self._lock.acquire()  # the system lets go of it however this process ends
        except OSError as error:
            raise UserError(
                f"checkpoint.scratch = {self.root} cannot be used ({error}): name a folder that every node can write to"
            ) from error

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


@contextmanager
def local_folder(uri: str, scratch: str | None = None) -> Iterator[Path]:
    """A checkpoint's folder on this machine: its own, or a copy below ``scratch`` that lives as long as the block."""
    if storage.is_local(uri):
        yield Path(uri)
        return
    own = Scratch(scratch)
    try:
        yield _fetch(uri, own)
    finally:
        own.remove()


@contextmanager
def folder_of_node(uri: str, scratch: Scratch) -> Iterator[Path]:
    """Likewise, for all workers, which call it together: of those of a node, one makes the copy."""
    if storage.is_local(uri):
        yield Path(uri)
        return
    node, is_first = os.environ.get("NODE_RANK"), os.environ["LOCAL_RANK"] == "0"
    copies: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(copies, (node, _fetch(uri, scratch)) if is_first else None)
    yield dict(filter(None, copies))[node]
    dist.barrier()  # all have read it
    if is_first:
        shutil.rmtree(scratch.folder / "fetched")


def _fetch(uri: str, scratch: Scratch) -> Path:
    filesystem, path = storage.arrow_filesystem(uri)
    folder = scratch.folder / "fetched"
    folder.mkdir()
    pyarrow.fs.copy_files(path, str(folder), source_filesystem=filesystem)
    return folder
