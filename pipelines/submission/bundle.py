"""The working directory that goes with a job: the project, or nothing but the job's config."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipelines.config import PROJECT_DIR
from pipelines.errors import UserError

Project = Literal["upload", "installed"]

_PARTS = ("lumos", "pipelines", "jobs", "infra")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.py[cod]", "*.egg-info", ".*", "pictures")
_MOST_MB = 32.0  # uncompressed; Ray keeps packages in the memory of the head, and every node unpacks its own copy


def choose_project(asked: str) -> Project:
    """What ``auto`` means: a checkout goes along, an installed release is expected on the cluster too.

    The cluster cannot be asked which release it has without a job there; the job itself refuses another one than this
    (:func:`pipelines.config.check_expected`).
    """
    if asked == "auto":
        return "upload" if (PROJECT_DIR / "pyproject.toml").exists() else "installed"
    return "upload" if asked == "upload" else "installed"


@contextmanager
def bundle(project: Project, files: Mapping[str, str], *, most_mb: float = _MOST_MB) -> Iterator[Path]:
    """A folder with the project, where it is to go along, and with the files (text by name).

    Raises:
        UserError: if it is larger than it may be; the largest files are named.
    """
    with tempfile.TemporaryDirectory(prefix="lumos-job-") as name:
        folder = Path(name)
        if project == "upload":
            for part in _PARTS:
                shutil.copytree(PROJECT_DIR / part, folder / part, ignore=_LEFT_OUT)
            if (PROJECT_DIR / "pyproject.toml").exists():
                shutil.copy(PROJECT_DIR / "pyproject.toml", folder)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        _check_size(folder, most_mb)
        yield folder


def _check_size(folder: Path, most_mb: float) -> None:
    sizes = [
        (os.path.getsize(path), path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
    ]  # fmt: skip
    total = sum(size for size, _ in sizes) / 1e6
    if total > most_mb:
        largest = ", ".join(f"{path} ({size / 1e6:.1f} MB)" for size, path in sorted(sizes, reverse=True)[:3])
        raise UserError(
            f"the project to upload has {total:.1f} MB, more than {most_mb:g}: move the largest files out of "
            f"{PROJECT_DIR} ({largest}), or use --project installed"
        )
