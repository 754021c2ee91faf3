"""Files on local disks and object stores behind plain functions of a URI; writes appear whole or not at all.

A URI is a local path or anything fsspec knows (``s3://bucket/key``). A local path and a key may hold any character,
``::``, ``#`` and ``*`` among them; one whose bytes are no UTF-8 is kept under an escaped name.

S3 fails now and then: what may pass is waited for (see s3.py), and what is left is an ``OSError`` as a disk would
raise it (see errors.py): ``FileNotFoundError`` where there is nothing, ``EIO`` where the store fails for long.
"""

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import UserError
from pipelines.storage import s3

_READ_AHEAD = 1 << 16  # bytes that are fetched of a remote file beyond those asked for
_UNFINISHED = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")  # names of files that are being written


@dataclass(frozen=True)
class FileInfo:
    """A file found by ``list_files``."""

    path: str  # relative to the folder that was listed, with "/"
    uri: str
    size: int  # bytes; -1 where it cannot be told (a broken symlink)
    version: str  # changes when the content may have: modification time or the store's entity tag


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it; a ``UserError`` if there is none for its protocol."""
    if is_local(uri):
        return LocalFileSystem(), os.path.abspath(_local_path(uri))
    try:
        if s3.is_s3(uri):
            return s3.filesystem(), s3.path(uri)
        fs, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri}: {error}; use a local path, s3:// or another protocol that fsspec offers") from error
    return fs, path


def _local_path(uri: str) -> str:
    """The path that a URI names; one with ``file://`` is percent-encoded."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))) if uri.startswith("file://") else uri


def _named(path: str, local: str) -> tuple[str, str]:
    r"""A path and a URI of a local file that are text, whatever bytes its name has.

    A name that is not UTF-8 (Python reads it with surrogates) shows its odd bytes as ``\xe9``, and is percent-encoded
    in a ``file://`` URI, by which it is opened.
    """
    try:
        local.encode()
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path).decode("utf-8", "backslashreplace"), "file://" + quote(os.fsencode(local))
    return path, local


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The same filesystem as Arrow and what builds on it, such as Ray Train, want it, and the path in it."""
    fs, path = filesystem(uri)
    local = isinstance(fs, LocalFileSystem)
    return pyarrow.fs.LocalFileSystem() if local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def join(uri: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def is_dir(uri: str) -> bool:
    """Whether there is a folder (in an object store: anything below that prefix)."""
    if s3.is_s3(uri):
        return s3.is_dir(uri)
    fs, path = filesystem(uri)
    return bool(fs.isdir(path))


def read_bytes(uri: str) -> bytes:
    """All of a file."""
    with open_file(uri) as file:
        return file.read()


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes ``start..stop-1`` of a file, by one request."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path, start=start, end=stop))


def read_json(uri: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(uri))


def write_bytes_atomic(uri: str, data: bytes) -> None:
    """Write a file so that no reader and no crash ever shows a part of it. Folders are made as needed."""
    if not is_local(uri):
        fs, path = filesystem(uri)
        fs.pipe_file(path, data)  # one put, or an upload in parts that counts only when completed
        return
    target = Path(filesystem(uri)[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_unfinished(uri: str) -> None:
    """Delete what writers that were killed left below a folder: parts of files, under names that nobody reads."""
    if is_local(uri):  # an object store shows none
        for partial in Path(filesystem(uri)[1]).rglob(".*.tmp"):
            if _UNFINISHED.fullmatch(partial.name):
                partial.unlink(missing_ok=True)


def write_json_atomic(uri: str, value: Any) -> None:
    """Write a value as indented JSON with sorted keys, as ``write_bytes_atomic`` does."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes_atomic(uri, (text + "\n").encode())


def remove(uri: str) -> None:
    """Delete a file or a folder with all in it, if there is one; an ``OSError`` if something of it is left."""
    fs, path = filesystem(uri)
    with suppress(FileNotFoundError):
        s3.remove(uri) if s3.is_s3(uri) else fs.rm(path, recursive=True)


def sha256_file(uri: str) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    with open_file(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_names(uri: str) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty where there is no such folder."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    try:
        entries = s3.list_keys(uri) if s3.is_s3(uri) else fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(name for entry in entries if (name := entry.rstrip("/").rpartition("/")[2]))


def list_files(uri: str, *, suffixes: Sequence[str] | None = None) -> list[FileInfo]:
    """All files below a folder, sorted by relative path; those whose name begins with a dot are left out.

    With ``suffixes``, only names that end in one of these, whatever their case.
    """
    walk = _walk_local(uri) if is_local(uri) else _walk_remote(uri)
    wanted = tuple(suffix.lower() for suffix in suffixes) if suffixes is not None else ("",)
    return sorted((found for found in walk if found.path.lower().endswith(wanted)), key=lambda found: found.path)


def describe_file(uri: str, path: str) -> FileInfo:
    """What ``list_files`` says of one local file; a remote one is described by its URI alone, without a request."""
    if is_local(uri):
        local = filesystem(uri)[1]
        path, uri = _named(path, local if uri.startswith("file://") else uri)
        with suppress(OSError):
            status = os.stat(local)
            return FileInfo(path=path, uri=uri, size=status.st_size, version=str(status.st_mtime_ns))
    return FileInfo(path=path, uri=uri, size=-1, version="")


def _walk_local(uri: str) -> Iterator[FileInfo]:
    root = filesystem(uri)[1]
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                full = os.path.join(folder, name)
                yield describe_file(full, os.path.relpath(full, root).replace(os.sep, "/"))


def _walk_remote(uri: str) -> Iterator[FileInfo]:
    fs, root = filesystem(uri)
    for found, detail in fs.find(root, detail=True).items():
        path = found.removeprefix(root).lstrip("/")
        if not any(part.startswith(".") for part in path.split("/")) and not path.endswith("/"):
            version = (
                detail.get("ETag") or detail.get("etag") or detail.get("LastModified") or detail.get("mtime") or ""
            )
            yield FileInfo(path=path, uri=join(uri, path), size=int(detail.get("size") or 0), version=str(version))


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """The path of a file's content on this machine: its own, or that of a copy which lives as long as the block."""
    if is_local(uri):
        yield filesystem(uri)[1]
        return
    fs, path = filesystem(uri)
    with tempfile.TemporaryDirectory(prefix="lumos-fetch-") as folder:
        target = os.path.join(folder, "file" + os.path.splitext(path)[1][:10])
        fs.get_file(path, target)
        yield target


@contextmanager
def open_file(uri: str) -> Iterator[BufferedReader]:
    """A file for reading, anywhere in it; one that is elsewhere is fetched whole, by one request."""
    with local_copy(uri) as path, open(path, "rb") as file:
        yield file


@contextmanager
def open_ranges(uri: str) -> Iterator[BinaryIO]:
    """A file of which little is read, as some columns of a Parquet file; of a remote one, little more is fetched."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") if is_local(uri) else fs.open(path, "rb", block_size=_READ_AHEAD) as file:
        yield file
