"""Three frames of a clip: of its looks, or decoded anew from its source wherever that still is what it was."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines import storage
from pipelines.data.settings import DecodeConfig
from pipelines.data.snapshot.card import reason_class
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.stage import Row
from pipelines.data.stage.table import STAGES, table_parts
from pipelines.data.steps.sources import hash_file
from pipelines.data.steps.split import CLIPS
from pipelines.data.video.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.video.frames import Wanted
from pipelines.data.video.local_files import LocalFiles
from pipelines.data.video.looks import decode_jpeg, encode_jpeg, read_rows
from pipelines.data.video.reader import ClipRequest, VideoError, fit_picture

MOMENTS = (
    "start",
    "middle",
    "end",
)  # of a clip's span, that are shown; the last one of the looks may be before its end
FRAME_HEIGHT = 120  # px
MAX_FETCHED = 24  # sources that are fetched from an object store; a film may have gigabytes
_FRAME_WIDTHS = (16, 480)  # px; what is narrower or wider loses its ends
_JPEG_QUALITY = 80
_STALL_SECONDS = 30.0  # without a frame before a decoder is killed
_READERS = 8  # threads, as a stage's table may have thousands of files
REQUEST = [item.name for item in fields(ClipRequest) if item.name in CLIPS.names]  # what decoding a clip takes

Shown = list[bytes] | VideoError  # a JPEG file per moment, or why there are none


def decode_frames(snapshot: Snapshot, clips: Sequence[Row]) -> dict[str, Shown]:
    """By key, JPEG files of the ``MOMENTS`` of each clip, or why they cannot be shown.

    Args:
        snapshot: Whose clips.
        clips: Ledger rows with a span. Sources are decoded for those that have no looks. Should too many of them have
            to be fetched, the first ones are.
    """
    looks = _show_looks(snapshot, clips)
    return looks | _show_sources(snapshot, [clip for clip in clips if clip["key"] not in looks])


def _show_looks(snapshot: Snapshot, clips: Sequence[Row]) -> dict[str, Shown]:
    """The clips that have looks in the table that the snapshot was made from, if it was made with looks."""
    shown: dict[str, Shown] = {}
    keys = [clip["key"] for clip in clips]
    for row in _read_parts(snapshot, "looks", lambda part: list(read_rows(part, "key", keys))):
        if images := row["images"]:
            chosen = dict.fromkeys((0, len(images) // 2, len(images) - 1))
            shown[row["key"]] = [_tile(images[index]) for index in chosen]
    return shown


def _tile(image: bytes) -> bytes:
    """A look at the height of a tile."""
    frame = decode_jpeg(image)
    height, width = frame.shape[:2]
    return encode_jpeg(fit_picture(frame, _tile_size(width / height)), _JPEG_QUALITY)


def _show_sources(snapshot: Snapshot, clips: Sequence[Row]) -> dict[str, Shown]:
    if not clips:
        return {}
    requests = {row["key"]: row for row in stage_rows(snapshot, "split", "key", clips, REQUEST)}
    sources = Sources()
    for row in stage_rows(snapshot, "sources", "source_id", clips, ["work_key"]):
        sources.places.setdefault(row["source_id"], []).append(row["work_key"])
    sources.allow([clip["source_id"] for clip in clips])
    ordered = sorted(clips, key=lambda clip: (clip["source_id"], clip["start_s"]))
    shown: dict[str, Shown] = {}
    with tempfile.TemporaryDirectory(prefix="lumos-contact-") as folder:
        child = DecodeChild(DecodeConfig(stall_seconds=_STALL_SECONDS), CrashLog(folder))
        jobs = (source_job(clip, requests.get(clip["key"]), sources, _moments) for clip in ordered)
        followers = [*(clip["source_id"] for clip in ordered[1:]), None]
        try:
            results = tqdm(child.run(jobs), total=len(ordered), desc="frames", unit="clip")
            for clip, follower, result in zip(ordered, followers, results, strict=True):
                shown[clip["key"]] = (
                    result
                    if isinstance(result, VideoError)
                    else [encode_jpeg(frame, _JPEG_QUALITY) for frame in result]
                )
                if follower != clip["source_id"]:
                    sources.release(clip["source_id"])
        finally:
            child.close()
            for name in {clip["source_id"] for clip in clips}:
                sources.release(name)
    return shown


def stage_rows(snapshot: Snapshot, stage: str, key: str, clips: Sequence[Row], columns: list[str]) -> list[Row]:
    """The clips' rows of a stage table that the snapshot was made from; none where it is not there any more."""
    wanted = pc.field(key).isin(pa.array(sorted({clip[key] for clip in clips}), pa.string()))

    def read(part: str) -> list[Row]:
        with storage.open_ranges(part) as file:
            rows: list[Row] = pq.read_table(file, columns=[key, *columns], filters=wanted).to_pylist()
        return rows

    return _read_parts(snapshot, stage, read)


def _read_parts(snapshot: Snapshot, stage: str, read: Callable[[str], list[Row]]) -> list[Row]:
    """What is read of each file of a stage table that the snapshot was made from; nothing if that is gone."""
    hashed = snapshot.manifest.created_from.get("stage_hashes", {}).get(stage)
    if snapshot.dataset is None or not hashed:
        return []
    uri = storage.join(snapshot.dataset, STAGES, stage, hashed)
    with ThreadPoolExecutor(_READERS) as pool:
        return list(chain.from_iterable(pool.map(read, table_parts(uri))))


def source_job(
    clip: Row, request: Row | None, sources: "Sources", wanted: Callable[[Row, Row], Wanted]
) -> DecodeJob | VideoError:
    """What decodes frames of a published clip from its source, or why that cannot be.

    Args:
        clip: Its key and source_id.
        request: Its row of the split stage, None where that is gone.
        sources: Where its source is.
        wanted: Which frames, given the clip and its row of the split stage.
    """
    if request is None:
        return VideoError("unknown_clip", "not in the stage tables of the dataset any more")
    try:
        path = sources.path(clip["source_id"])
    except VideoError as error:
        return error
    found = ClipRequest(path=path, **vars(wanted(clip, request)), **{name: request[name] for name in REQUEST})
    return DecodeJob(clip["key"], "clip", {"request": found}, after_crash={"use_decord": False})


def _moments(_: Row, request: Row) -> Wanted:
    """The moments of a clip at the height of a tile, in the shape of its picture."""
    _, _, width, height = request["picture"]
    fps = (len(MOMENTS) - 1) / max(request["end_s"] - request["start_s"], 1e-3)
    return Wanted(fps, len(MOMENTS), *_tile_size(width * request["pixel_aspect"] / height))


def _tile_size(aspect: float) -> tuple[int, int]:
    """Width and height of a frame that is shown, px."""
    return min(max(round(FRAME_HEIGHT * aspect), _FRAME_WIDTHS[0]), _FRAME_WIDTHS[1]), FRAME_HEIGHT


@dataclass
class Sources:
    """Local paths of sources, by content; only of files that still have it."""

    places: dict[str, list[str]] = field(default_factory=dict)  # keys of the sources stage: URI, size and version
    files: LocalFiles = field(default_factory=LocalFiles)
    fetched: set[str] = field(default_factory=set)  # sources that may be fetched
    found: dict[str, str | VideoError] = field(default_factory=dict)

    def allow(self, source_ids: Sequence[str]) -> None:
        """Let the first of the sources that are not on this machine be fetched."""
        remote = [name for name in dict.fromkeys(source_ids) if not any(map(storage.is_local, self._uris(name)))]
        self.fetched = set(remote[:MAX_FETCHED])

    def path(self, source_id: str) -> str:
        """Where a source's content is on this machine.

        Raises:
            VideoError: if none of its files has it, or it would have to be fetched and may not.
        """
        if source_id not in self.found:
            self.found[source_id] = self._find(source_id)
        found = self.found[source_id]
        if isinstance(found, VideoError):
            raise found
        return found

    def _find(self, source_id: str) -> str | VideoError:
        error = VideoError("unknown_source", "the dataset does not tell any more where it was")
        for key, uri in zip(self.places.get(source_id, ()), self._uris(source_id), strict=True):
            if not storage.is_local(uri) and source_id not in self.fetched:
                error = VideoError("not_fetched", f"no more than {MAX_FETCHED} files are fetched for this page")
                continue
            try:
                path = self._fetch(uri)
                _check_content(path, source_id, key if storage.is_local(uri) else None)
            except VideoError as why:
                error = why
                self.files.release(uri)
            else:
                return path
        return error

    def _fetch(self, uri: str) -> str:
        try:
            return self.files.path(uri)
        except VideoError:
            raise
        except Exception as error:  # the client of a store that is out of reach raises its own kinds
            logging.exception("cannot fetch %s; nothing more is fetched", uri)
            self.fetched = set()
            raise VideoError("not_fetched", f"{type(error).__name__}: {error}"[:200]) from error

    def release(self, source_id: str) -> None:
        """Delete what was fetched of a source."""
        self.found.pop(source_id, None)
        for uri in self._uris(source_id):
            self.files.release(uri)

    def _uris(self, source_id: str) -> list[str]:
        return [key.rsplit("\n", 2)[0] for key in self.places.get(source_id, ())]


def _check_content(path: str, source_id: str, key: str | None) -> None:
    """See that a file is still what it was: untouched since it got its key, or else of the same hash.

    Raises:
        VideoError: if it is not, or is gone.
    """
    file = storage.describe_file(path, "")
    if key == f"{file.uri}\n{file.size}\n{file.version}":
        return
    hashed = hash_file(path)
    if hashed["error"]:
        raise VideoError(reason_class(hashed["error"]), hashed["error"].partition(": ")[2])
    if hashed["source_id"] != source_id:
        raise VideoError("changed_file", "holds another content than when it was curated")
