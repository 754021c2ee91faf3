"""One run at a time on a dataset."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pipelines import storage
from pipelines.errors import UserError


@contextmanager
def dataset_lock(dataset: str) -> Iterator[None]:
    """Hold a dataset for the time of the block. The system lets go of it when the process dies, however it does.

    Datasets in object stores are not locked.

    Raises:
        UserError: if another run holds it; the message names that run.
    """
    if not storage.is_local(dataset):
        yield
        return
    folder = Path(storage.filesystem(dataset)[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"dataset {dataset} cannot be written to ({error.strerror}); name another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"dataset {dataset} is in use by another run ({file.read().strip() or 'just starting'}): wait for it, "
                "stop it, or name another dataset"
            ) from error
        file.seek(0)
        file.truncate()
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        file.write(json.dumps(holder))
        file.flush()
        yield
