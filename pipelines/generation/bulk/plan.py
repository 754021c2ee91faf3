"""What a bulk run is to make: every video with its file, its request and its row of the manifest."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lumos.compression import VideoSize
from lumos.encoder import RequestEncoder, SizeError
from pipelines import storage
from pipelines.cores import usable_cores
from pipelines.decoding.given import GivenError, OtherKindError, read_clip, read_image
from pipelines.errors import UserError, listed
from pipelines.generation.bulk.layouts import Entry, layout_entries
from pipelines.generation.bulk.prompts import Prompt
from pipelines.generation.config import MAX_SEED, GenerateConfig
from pipelines.generation.model import ModelCard
from pipelines.generation.request import VideoRequest

_MAX_GIVEN_BYTES = 4_000_000_000  # of given frames, which the driver holds

_Source = tuple[str, str]  # "image" or "clip", and where it is


@dataclass(frozen=True)
class Job:
    """A video to make."""

    request: VideoRequest
    row: dict[str, Any]  # of the manifest


def plan(config: GenerateConfig, card: ModelCard) -> list[Job]:
    """Every video of a run, each known to fit the model.

    Raises:
        UserError: if prompts, size or given frames cannot be used, or two videos would be the same.
    """
    encoder = RequestEncoder(card.folder)
    try:
        size = encoder.size(**asdict(config.video))
    except ValueError as error:
        raise UserError(f"video: {error}") from error
    entries = layout_entries(config, size)
    given = _read_all_given(entries, config, size)
    jobs: list[Job] = []
    mistakes: dict[str, None] = {}  # in order, those of a prompt's several videos once
    known: dict[str, str | None] = {}  # what is wrong with a prompt's text, if anything
    first_of: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        prompt, source = entry.prompt, _source(entry.prompt, config)
        same = first_of.setdefault((prompt.text, source, entry.seed), entry)
        if same is not entry:
            mistakes[
                f"{prompt.where} asks for the same video as {same.prompt.where} (seed {entry.seed}): give it another "
                "seed, or leave the seed out of both, so that each gets one of its own"
            ] = None
            continue
        try:
            if entry.seed > MAX_SEED:
                raise ValueError(f"seed {entry.seed} is above 2^63-1")
            request = VideoRequest(
                prompt=prompt.text,
                seed=entry.seed,
                size=size,
                sampling=card.sampling,
                format=config.format,
                motion=config.motion,
                given=given.get(source) if source else None,
            )
            if prompt.text not in known:
                known[prompt.text] = _misfit(request, encoder)
            if (misfit := known[prompt.text]) is not None:
                raise ValueError(misfit)
        except ValueError as error:
            mistakes[f"{prompt.where} ({prompt.text[:60]!r}): {error}"] = None
        else:
            jobs.append(Job(request, _row(entry, request, source, card)))
    if mistakes:
        raise UserError(listed([*mistakes]))
    return jobs


def _misfit(request: VideoRequest, encoder: RequestEncoder) -> str | None:
    """Why a prompt is nothing for the model; a ``UserError`` if no prompt would be."""
    try:
        request.encode(encoder)
    except SizeError as error:
        raise UserError(f"video: {error}") from error
    except ValueError as error:
        return str(error)
    return None


def _row(entry: Entry, request: VideoRequest, source: _Source | None, card: ModelCard) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": entry.paths[0],
        "index": entry.index,
        "id": entry.prompt.id,
        "prompt": entry.prompt.text,
        "seed": entry.seed,
        "config_hash": request.config_hash(card.identity),
        **asdict(request.size),
    }
    if len(entry.paths) > 1:
        row["copies"] = list(entry.paths[1:])
    if entry.named_by is not None:
        row["named_by"] = entry.named_by
    if source is not None:
        row[source[0]] = source[1].rpartition("/")[2]
    return row


def _source(prompt: Prompt, config: GenerateConfig) -> _Source | None:
    """What the videos of a prompt begin with: what its row names, else what the config names."""
    if prompt.image is not None:
        return "image", prompt.image
    if prompt.clip is not None:
        return "clip", prompt.clip
    if config.image is not None:
        return "image", config.image
    return ("clip", config.clip) if config.clip is not None else None


def _read_all_given(
    entries: Sequence[Entry], config: GenerateConfig, size: VideoSize
) -> dict[_Source | None, NDArray[np.uint8]]:
    """The given frames of all entries, each file read once."""
    where: dict[_Source, str] = {}
    for entry in entries:
        source = _source(entry.prompt, config)
        if source is not None:
            named = source[1] in (entry.prompt.image, entry.prompt.clip)
            where.setdefault(source, f"{entry.prompt.where}: {source[0]} " if named else f"{source[0]}: ")
    if len(where) * size.width * size.height * 3 > _MAX_GIVEN_BYTES:
        raise UserError(f"prompts: {len(where)} pictures or clips are given, too many for one run: split the file")

    def read(source: _Source) -> NDArray[np.uint8] | GivenError:
        kind, path = source
        try:
            return read_image(path, size) if kind == "image" else read_clip(path, size)
        except GivenError as error:
            return error

    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            frames = dict(zip(where, pool.map(read, where), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    mistakes = []
    for source, found in frames.items():
        if isinstance(found, GivenError):
            other = "clip (--continue)" if source[0] == "image" else "image (--image)"
            remedy = f"; give it as {other}" if isinstance(found, OtherKindError) else ""
            mistakes.append(f"{where[source]}{source[1]}: {found}{remedy}")
    if mistakes:
        raise UserError(listed(mistakes))
    return {source: found for source, found in frames.items() if not isinstance(found, GivenError)}


def check_writable(folder: str) -> None:
    """See, without leaving anything behind, whether files can be made in a local folder; a ``UserError`` if not."""
    if not storage.is_local(folder):
        return
    path = storage.filesystem(folder)[1]
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
        why = "may not be written to" if os.path.isdir(path) else "is no folder"
        raise UserError(f"output: cannot write {folder}: {path} {why}; name another folder")
