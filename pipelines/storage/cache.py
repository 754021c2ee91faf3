"""Files of a store that programs want as files of this machine: fetched once, whatever processes ask for them.

What is fetched is kept under a name made of the store's entity tags, so that another content is another copy, under
``LUMOS_CACHE`` or ``~/.cache/lumos``. Nothing is ever deleted there: remove the folder to have its space back.
"""

import errno
import hashlib
import os
import shutil
from pathlib import Path

from filelock import FileLock

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import s3
from pipelines.storage.files import FileInfo

_CHANGES = 3  # of the files in the store while they are fetched


def cache_folder() -> Path:
    """Where fetched files are kept on this machine."""
    named = os.environ.get("LUMOS_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lumos"


def local_path(uri: str) -> str:
    """The path on this machine of a file, or of a folder with the files directly in it, fetched if need be.

    Of a folder, names that begin with a dot and folders in it are left out.

    Raises:
        UserError: if the store cannot be used, or the files change all the time.
        FileNotFoundError: if nothing is there.
        OSError: if it cannot be fetched or kept.
    """
    if storage.is_local(uri):
        return str(storage.filesystem(uri)[1])
    uri = uri.rstrip("/")
    s3.check_store(uri)
    for _ in range(_CHANGES):
        files = _list(uri)
        target = cache_folder() / _key(files) / Path(*_last_names(uri))
        if target.exists() or _fetch(uri, files, target):
            return str(target)
    raise UserError(f"{uri} changes while it is fetched: wait until it is written, and give the same command again")


def _list(uri: str) -> list[FileInfo]:
    """The file itself, with the path "", or the files directly in a folder."""
    if not storage.exists(uri):
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", uri)
    files = [file for file in storage.list_files(uri) if "/" not in file.path]
    if not files:
        raise FileNotFoundError(errno.ENOENT, "there are no files", uri)
    return files


def _key(files: list[FileInfo]) -> str:
    said = "\n".join(f"{file.path} {file.size} {file.version}" for file in files)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _last_names(uri: str) -> list[str]:
    """The end of a URI: people know a model by it, and an ``export`` by what it lies in."""
    return storage.filesystem(uri)[1].split("/")[-2:]


def _fetch(uri: str, files: list[FileInfo], target: Path) -> bool:
    """Bring files to a folder that appears whole, unless they change; of processes that want it, one does the work."""
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{target.relative_to(root).parts[0]}.lock"):
            if target.exists():
                return True
            partial = root / f".fetching-{target.relative_to(root).parts[0]}"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed, as the lock is ours
            partial.mkdir()
            try:
                fs, _ = storage.filesystem(uri)
                for file in files:
                    here = partial / (file.path or target.name)
                    fs.get_file(storage.filesystem(file.uri)[1], str(here))
                    if here.stat().st_size != file.size:
                        raise OSError(errno.EIO, f"only {here.stat().st_size} of {file.size} bytes came", file.uri)
                if _list(uri) != files:  # what came may be of a later version, whose name is another
                    return False
                target.parent.mkdir(parents=True, exist_ok=True)
                (partial if files[0].path else partial / target.name).rename(target)
                return True
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except PermissionError as error:
        if "://" in str(error.filename):  # the store's, not the disk's
            raise UserError(
                f"{uri} cannot be read ({error.strerror}: {error.filename}): these credentials may list it, and must "
                "be allowed to get its objects"
            ) from error
        raise UserError(
            f"{root} cannot be written to ({error.strerror}), and {uri} is to be kept there: set LUMOS_CACHE to a "
            "folder that can"
        ) from error
