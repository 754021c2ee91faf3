"""What is evaluated: the videos of a folder, which prompt and seed each is of, and their frames."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines import storage
from pipelines.errors import UserError
from pipelines.generation.bulk.manifest import MANIFEST_FILE
from pipelines.generation.bulk.run import RUN_FILE

SUFFIXES = (".mp4", ".gif", ".png", ".webm", ".mov", ".mkv", ".avi", ".jpg", ".jpeg")
STILLS = (".png", ".jpg", ".jpeg")
_ONE_THREAD = (cv2.CAP_PROP_N_THREADS, 1)  # else one for each of the machine's cores, in each video
_MAX_NAMED = 8  # of the runs in a folder
_NUMBERED = re.compile(r"(.*\S)\s*-(\d+)", re.DOTALL)  # VBench's names


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video or picture, and what it was made of."""

    path: str  # below its folder
    uri: str
    prompt: str
    seed: int  # or its number among the videos of its prompt


@dataclass(frozen=True, kw_only=True)
class VideoFolder:
    """A set of videos, as one model made it."""

    uri: str
    label: str  # short, and unlike that of any other folder
    videos: tuple[VideoFile, ...]
    note: Mapping[str, Any]  # what `lumos generate` noted of the run; empty if something else made them


def row_keys(videos: Iterable[VideoFile]) -> list[tuple[str, int, int]]:
    """By which videos of several folders are matched: prompt, seed, and how many of the folder had both before."""
    seen: Counter[tuple[str, int]] = Counter()
    keys = []
    for video in videos:
        keys.append((video.prompt, video.seed, seen[video.prompt, video.seed]))
        seen[video.prompt, video.seed] += 1
    return keys


def read_folder(uri: str, label: str) -> VideoFolder:
    """The videos of a folder, local or on S3: those of its manifest, else all, named ``{prompt}-{number}``.

    Raises:
        UserError: if there are none, the manifest is damaged, or folders in it are runs of their own.
    """
    manifest = storage.join(uri, MANIFEST_FILE)
    if not storage.is_dir(uri):
        raise UserError(f"{uri} is no folder: name one that `lumos generate` wrote, or a folder of videos")
    note: Mapping[str, Any] = {}
    if storage.exists(manifest):
        videos = _of_manifest(uri, manifest)
        run_file = storage.join(uri, RUN_FILE)
        note = storage.read_json(run_file) if storage.exists(run_file) else {}
    else:
        files = storage.list_files(uri, suffixes=(*SUFFIXES, MANIFEST_FILE))
        _check_one_run(
            uri, [path.rpartition("/")[0] for path in (x.path for x in files) if _name(path) == MANIFEST_FILE]
        )
        videos = [_of_name(found) for found in files if found.path.lower().endswith(SUFFIXES)]
    if not videos:
        raise UserError(f"{uri} holds no videos ({', '.join(SUFFIXES)}): name the folder that does")
    return VideoFolder(uri=uri, label=label, videos=tuple(videos), note=note)


def _check_one_run(uri: str, runs: Sequence[str]) -> None:
    """Raise a ``UserError`` if a folder holds runs: they are of several models or settings, and would be one set."""
    if runs:
        named = [storage.join(uri, run) for run in runs[:_MAX_NAMED]]
        more = f" and {len(runs) - _MAX_NAMED} more" if len(runs) > _MAX_NAMED else ""
        what = f"{len(runs)} runs of `lumos generate`" if len(runs) > 1 else "a run of `lumos generate`"
        raise UserError(f"{uri} holds {what}, and is none: name the folders themselves, {' '.join(named)}{more}")


def _of_manifest(folder: str, manifest: str) -> list[VideoFile]:
    try:
        lines = storage.read_bytes(manifest).decode("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return [
            VideoFile(
                path=str(row["path"]),
                uri=storage.join(folder, str(row["path"])),
                prompt=str(row["prompt"]),
                seed=int(row["seed"]),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest} is no manifest of videos ({error}): make the folder again with `lumos generate`, or remove "
            "the file, so that prompts are read from the videos' names"
        ) from error


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _of_name(found: storage.FileInfo) -> VideoFile:
    stem = _name(found.path).rpartition(".")[0]
    numbered = _NUMBERED.fullmatch(stem)
    prompt, number = (numbered[1], int(numbered[2])) if numbered else (stem, 0)
    return VideoFile(path=found.path, uri=found.uri, prompt=prompt, seed=number)


def read_frames(uri: str) -> tuple[NDArray[np.uint8], float]:
    """All frames of a video, RGB [T, H, W, 3], and frames per second; a picture is one frame.

    OpenCV decodes, as it does for VBench, whose figures depend on how colours are converted.

    Raises:
        ValueError: if nothing of it can be decoded.
        OSError: if it cannot be read.
    """
    with storage.local_copy(uri) as path:
        if path.lower().endswith(STILLS):
            picture = cv2.imread(path, cv2.IMREAD_COLOR)
            frames, fps = ([] if picture is None else [picture]), 1.0
        else:
            video = cv2.VideoCapture(path, cv2.CAP_ANY, _ONE_THREAD)
            fps = video.get(cv2.CAP_PROP_FPS)
            frames = []
            while (answer := video.read())[0]:
                frames.append(answer[1])
            video.release()
        if not frames:
            storage.read_bytes(path)  # a missing file says so itself
            raise ValueError("no frame of it can be decoded")
    return np.ascontiguousarray(np.stack(frames)[..., ::-1]), fps if fps > 0 else 1.0
