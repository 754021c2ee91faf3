"""Clips of a published snapshot, decoded anew from their sources wherever these still are what they were.

``decode_clips`` decodes any frames of them, ``decode_frames`` the three that contact sheets show; looks serve as well.
"""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines import storage
from pipelines.data.keys import file_key, picture_key, uri_of_file
from pipelines.data.reasons import parse_failure
from pipelines.data.settings import DecodeConfig
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.stage import Row
from pipelines.data.steps.sources import hash_file
from pipelines.data.upkeep.tables import snapshot_parts, snapshot_rows
from pipelines.data.video.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.frames import REQUEST_COLUMNS, LocalFiles, Wanted, clip_job
from pipelines.data.video.looks import decode_jpeg, encode_jpeg, read_rows
from pipelines.data.video.reader import fit_picture
from pipelines.decoding.errors import VideoError

MOMENTS = ("start", "middle", "end")  # of a clip's span, that are shown; the last of the looks may be before its end
FRAME_HEIGHT = 120  # px
MAX_FETCHED = 24  # sources that are fetched from an object store; a film may have gigabytes
_FRAME_WIDTHS = (16, 480)  # px; what is narrower or wider loses its ends
_READERS = 8  # threads, as a store takes long to answer
_JPEG_QUALITY = 80
_STALL_SECONDS = 30.0  # without a frame before a decoder is killed
_REQUEST = [*REQUEST_COLUMNS, "fingerprint"]  # what decoding a clip takes

Shown = list[bytes] | VideoError  # a JPEG file per moment, or why there are none


def decode_frames(snapshot: Snapshot, clips: Sequence[Row]) -> dict[str, Shown]:
    """By key, JPEG files of the ``MOMENTS`` of each clip (ledger rows with a span), or why they cannot be shown.

    Sources are decoded for those that have no looks. Should too many of them have to be fetched, the first ones are.
    """
    looks = _show_looks(snapshot, clips)
    decoded = decode_clips(snapshot, [clip for clip in clips if clip["key"] not in looks], _moments)
    return looks | {
        clip["key"]: result
        if isinstance(result, VideoError)
        else [encode_jpeg(frame, _JPEG_QUALITY) for frame in result]
        for clip, result in decoded
    }


def _show_looks(snapshot: Snapshot, clips: Sequence[Row]) -> dict[str, Shown]:
    """The clips that have looks in the table that the snapshot was made from, if it was made with looks.

    A clip's looks are known by its picture too: the table may hold others of it, of another crop.
    """
    found: dict[str, dict[str, list[bytes]]] = defaultdict(dict)  # by key and work key
    keys = [clip["key"] for clip in clips]
    with ThreadPoolExecutor(_READERS) as pool:
        for rows in pool.map(lambda part: list(read_rows(part, "key", keys)), snapshot_parts(snapshot, "looks")):
            for row in rows:
                if row["images"]:
                    found[row["key"]][row["work_key"]] = row["images"]
    several = [clip for clip in clips if len(found.get(clip["key"], ())) > 1]
    pictures = list(_stage_rows(snapshot, "split", "key", several, ["picture"])) if several else []
    own = {row["key"]: picture_key(row["key"], row["picture"]) for row in pictures}
    shown: dict[str, Shown] = {}
    for key, looks in found.items():
        if images := looks.get(own[key]) if key in own else next(iter(looks.values())):
            chosen = dict.fromkeys((0, len(images) // 2, len(images) - 1))
            shown[key] = [frame_tile(decode_jpeg(images[index])) for index in chosen]
    return shown


def frame_tile(frame: NDArray[np.uint8]) -> bytes:
    """A JPEG file of a frame at the height of a tile."""
    height, width = frame.shape[:2]
    return encode_jpeg(fit_picture(frame, _tile_size(width / height)), _JPEG_QUALITY)


def decode_clips(
    snapshot: Snapshot,
    clips: Sequence[Row],
    wanted: Callable[[Row, Row], Wanted],
    *,
    fetch_all: bool = False,
) -> Iterator[tuple[Row, NDArray[np.uint8] | VideoError]]:
    """Each clip with its frames [T, H, W, 3], or why there are none; one source after another, a bar tells how far.

    Args:
        snapshot: Whose clips; it must lie in its dataset, as the stages know where the sources are.
        clips: Rows with ``key`` and ``source_id``.
        wanted: Which frames, given the clip and its row of the split stage.
        fetch_all: Fetch all sources that are in a store, however many; else the first ``MAX_FETCHED``.
    """
    if not clips:
        return
    requests = {row["key"]: row for row in _stage_rows(snapshot, "split", "key", clips, _REQUEST)}
    places: dict[str, list[str]] = defaultdict(list)
    for row in _stage_rows(snapshot, "sources", "source_id", clips, ["work_key"]):
        places[row["source_id"]].append(row["work_key"])
    sources = _Sources(places, [clip["source_id"] for clip in clips], None if fetch_all else MAX_FETCHED)
    ordered = sorted(clips, key=itemgetter("source_id", "key"))
    last_of = {clip["source_id"]: clip["key"] for clip in ordered}
    with tempfile.TemporaryDirectory(prefix="lumos-clips-") as folder:
        child = DecodeChild(DecodeConfig(stall_seconds=_STALL_SECONDS), CrashLog(folder))
        results = child.run(_jobs(ordered, requests, sources, wanted))
        try:
            bar = tqdm(results, total=len(ordered), desc="decode", unit="clip")
            for clip, result in zip(ordered, bar, strict=True):
                yield clip, result
                if last_of[clip["source_id"]] == clip["key"]:
                    sources.release(clip["source_id"])
        finally:
            child.close()
            for source_id in last_of:
                sources.release(source_id)


def _stage_rows(snapshot: Snapshot, stage: str, key: str, clips: Sequence[Row], columns: list[str]) -> Iterator[Row]:
    for table in snapshot_rows(snapshot, stage, key, (clip[key] for clip in clips), [key, *columns]):
        yield from table.to_pylist()


def _jobs(
    ordered: Sequence[Row], requests: Mapping[str, Row], sources: "_Sources", wanted: Callable[[Row, Row], Wanted]
) -> Iterator[DecodeJob | VideoError]:
    """What decodes each clip, or why that cannot be; each source is looked for once."""
    for source_id, clips in groupby(ordered, key=itemgetter("source_id")):
        path: str | VideoError | None = None
        for clip in clips:
            request = requests.get(clip["key"])
            if request is None:
                yield VideoError("unknown_clip", "not in the stage tables of the dataset any more")
                continue
            path = path or sources.find(source_id)
            if isinstance(path, VideoError):
                yield path
                continue
            yield clip_job(request | {"work_key": clip["key"]}, path, wanted(clip, request))


def _moments(_: Row, request: Row) -> Wanted:
    """The moments of a clip at the height of a tile, in the shape of its picture."""
    _, _, width, height = request["picture"]
    fps = (len(MOMENTS) - 1) / max(request["end_s"] - request["start_s"], 1e-3)
    return Wanted(fps, len(MOMENTS), *_tile_size(width * request["pixel_aspect"] / height))


def _tile_size(aspect: float) -> tuple[int, int]:
    """Width and height of a frame that is shown, px."""
    return min(max(round(FRAME_HEIGHT * aspect), _FRAME_WIDTHS[0]), _FRAME_WIDTHS[1]), FRAME_HEIGHT


class _Sources:
    """Where sources are on this machine, by content; only files that still have it.

    ``places`` are keys of the sources stage by source. ``source_ids`` are in the order of their importance: of those
    that are not on this machine, the first ones may be fetched.
    """

    def __init__(self, places: Mapping[str, Sequence[str]], source_ids: Sequence[str], max_fetched: int | None) -> None:
        self._places = places
        self._files = LocalFiles()
        remote = [name for name in dict.fromkeys(source_ids) if not any(map(storage.is_local, self._uris(name)))]
        self._may_fetch = set(remote[:max_fetched])

    def find(self, source_id: str) -> str | VideoError:
        """The path of a source, or why none of its files can be had."""
        error = VideoError("unknown_source", "the dataset does not tell any more where it was")
        for key in self._places.get(source_id, ()):
            uri = uri_of_file(key)
            try:
                path = self._fetch(uri, source_id)
                _check_content(path, source_id, key if storage.is_local(uri) else None)
            except VideoError as why:
                error = why
                self._files.release(uri)
            else:
                return path
        return error

    def release(self, source_id: str) -> None:
        """Delete what was fetched of a source."""
        for uri in self._uris(source_id):
            self._files.release(uri)

    def _fetch(self, uri: str, source_id: str) -> str:
        if not storage.is_local(uri) and source_id not in self._may_fetch:
            raise VideoError("not_fetched", f"no more than {MAX_FETCHED} files are fetched")
        try:
            return self._files.path(uri)
        except VideoError:
            raise
        except Exception as error:  # the client of a store that is out of reach raises its own kinds
            logging.exception("cannot fetch %s; nothing more is fetched", uri)
            self._may_fetch = set()
            raise VideoError("not_fetched", f"{type(error).__name__}: {error}"[:200]) from error

    def _uris(self, source_id: str) -> list[str]:
        return [uri_of_file(key) for key in self._places.get(source_id, ())]


def _check_content(path: str, source_id: str, key: str | None) -> None:
    """Raise a ``VideoError`` unless a file is what it was: untouched since it got its key, or else of the same hash."""
    if key == file_key(storage.describe_file(path, "")):
        return
    hashed = hash_file(path)
    if hashed["error"]:
        failure = parse_failure(hashed["error"])
        raise VideoError(failure.code, failure.detail)
    if hashed["source_id"] != source_id:
        raise VideoError("changed_file", "holds another content than when it was curated")
