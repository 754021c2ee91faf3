"""Kept clips as files for other programs: videos with captions and scores, one by one or in WebDataset's tar files.

A file is there whole or not at all, and what is there is not made again: a command that was stopped goes on. What is
exported stands in ``export.json`` from the beginning on; ``clips.jsonl``, written last, lists every clip.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lumos.tokenizers import VideoTokenizer
from pipelines import storage
from pipelines.data.reasons import reason_of
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.codes import decode_codes, encoded_frames, find_clips, read_clips
from pipelines.data.upkeep.stills import decode_clips
from pipelines.decoding.errors import VideoError
from pipelines.errors import JobError, UserError
from pipelines.media import VideoFormat, encode_video

_BATCH = 64  # clips that are made together; of a tar file, as many as ``shard_clips``
_NAMED = 3  # sources that an error names
_ABOUT, _LIST = "export.json", "clips.jsonl"
_COLUMNS = ("source_id", "split", "captions", "fps", "t", "h", "w")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written of each clip, and how."""

    clips: Literal["mp4", "gif"] = "mp4"  # kind of the videos; of an image it is a PNG
    layout: Literal["files", "webdataset"] = "files"
    frames: Literal["source", "codes"] = "source"  # what they show: the frames that were encoded, or what codes give
    shard_clips: int = 256  # clips in a tar file


@dataclass
class Exported:
    """What was written."""

    made: int = 0  # clips, by this call
    before: int = 0  # clips that were there
    missing: dict[str, str] = field(default_factory=dict)  # by clip, why it could not be made

    def __str__(self) -> str:
        """A line for a person."""
        return f"{self.made + self.before} clips" + (f", {self.before} of them were there" if self.before else "")


def export_clips(snapshot: Snapshot, out: str, export: Export, tokenizer: VideoTokenizer | None = None) -> Exported:
    """Write all kept clips of a snapshot to a folder or an s3:// prefix.

    Raises:
        UserError: the place holds another export, or the sources cannot be known; nothing was written.
        JobError: clips could not be made, as their sources are gone; the others are there, and no list of them.
    """
    if export.frames == "source" and snapshot.dataset is None:
        raise UserError(
            f"{snapshot.uri} lies in no dataset, which would know its sources: name the dataset, or give --frames codes"
        )
    clips = _clips(snapshot)
    _claim(out, {"snapshot": snapshot.manifest.snapshot_id, "digest": snapshot.digest, **asdict(export)})
    size = export.shard_clips if export.layout == "webdataset" else _BATCH
    done, folder = Exported(), storage.join(out, "clips")
    there = set(storage.list_names(folder if export.layout == "files" else out))
    for number, first in enumerate(range(0, clips.num_rows, size)):
        batch = clips.slice(first, size)
        if export.layout == "webdataset":
            name = f"clips-{number:06d}.tar"
            new = pa.array([name not in there] * batch.num_rows)
        else:
            new = pa.array(
                [_video_name(row, export) not in there for row in batch.select(["clip_id", "t"]).to_pylist()]
            )
        batch = batch.filter(new)
        done.before += len(new) - batch.num_rows
        made = _made(snapshot, batch, export, tokenizer, done)
        if export.layout == "webdataset" and batch.num_rows:
            _write_tar(storage.join(out, name), made, done)
        else:
            _write_files(folder, made, done)
    if done.missing:
        raise _lacking(out, export, done)
    lines = [json.dumps(about(row), ensure_ascii=False) + "\n" for row in clips.to_pylist()]
    storage.write_bytes_atomic(storage.join(out, _LIST), "".join(lines).encode())
    return done


def file_name(key: str) -> str:
    """The name of a clip's files, without an ending: its key, in characters that any disk and tar reader takes."""
    return key.replace(":", "_")


def about(clip: Row) -> Row:
    """What is told of a clip beside its video."""
    told = {name: clip[name] for name in ("path", "source_id", "start_s", "end_s", "split", "fps")}
    captions = clip["captions"] or []
    scores = {name: value for name, value in (clip["scores"] or {}).items() if value is not None}
    return {"key": clip["clip_id"], "name": file_name(clip["clip_id"]), **told, "captions": captions, "scores": scores}


def _clips(snapshot: Snapshot) -> pa.Table:
    """All kept clips: where their codes are, what is published of them, and what the ledger says; sorted by key."""
    found = find_clips(snapshot, _COLUMNS)
    columns = ["key", "path", "start_s", "end_s", "scores"]
    pieces = [
        piece.filter(pc.equal(piece["status"], "kept")).select(columns)
        for piece in snapshot.ledger_pieces([*columns, "status"])
    ]
    if not found.num_rows or not pieces:
        raise UserError(f"{snapshot.uri} has kept no clip: there is nothing to export")
    ledger = pa.concat_tables(pieces).combine_chunks()
    places = pc.index_in(found["clip_id"], ledger["key"].combine_chunks())
    if places.null_count:
        raise UserError(f"{snapshot.uri}: its ledger lacks clips of its shards; `lumos data verify` names them")
    rows = ledger.take(places)
    for name in columns:
        found = found.append_column(name, rows[name])
    return found


def _claim(out: str, identity: Row) -> None:
    """Note what is exported, or see that what was begun there is the same."""
    uri = storage.join(out, _ABOUT)
    if storage.exists(uri):
        there = storage.read_json(uri)
        other = [name for name, value in identity.items() if there.get(name) != value]
        if other:
            told = ", ".join(f"{name} {there.get(name)}" for name in other if name != "digest") or "other bytes"
            raise UserError(f"{out} holds another export ({told}): name another place, or delete it")
        return
    if storage.list_names(out):
        raise UserError(f"{out} is not empty, and holds no export: name another place")
    storage.write_json_atomic(uri, identity)


def _write_files(folder: str, made: Iterator[tuple[Row, dict[str, bytes]]], done: Exported) -> None:
    """A file of each clip and two of words, which are there before it."""
    for row, files in made:
        for ending, data in files.items():
            storage.write_bytes_atomic(storage.join(folder, f"{file_name(row['clip_id'])}.{ending}"), data)
        done.made += 1


def _write_tar(uri: str, made: Iterator[tuple[Row, dict[str, bytes]]], done: Exported) -> None:
    """A tar file of some clips; if one of them cannot be made, none is written."""
    lacking = len(done.missing)
    files = {row["clip_id"]: files for row, files in made}
    if len(done.missing) > lacking:
        return
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(files):
            for ending, data in files[key].items():
                info = tarfile.TarInfo(f"{file_name(key)}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    storage.write_bytes_atomic(uri, buffer.getvalue())
    done.made += len(files)


def _made(
    snapshot: Snapshot, batch: pa.Table, export: Export, tokenizer: VideoTokenizer | None, done: Exported
) -> Iterator[tuple[Row, dict[str, bytes]]]:
    """Clips with their files by ending, the video last; those that cannot be made are noted."""
    for row, frames in _frames(snapshot, batch, tokenizer if export.frames == "codes" else None):
        if isinstance(frames, VideoError):
            done.missing[row["clip_id"]] = f"{row['path']}: {reason_of(frames)}"
            continue
        kind = _kind(row, export)
        captions = [caption["text"] for caption in row["captions"] or ()]
        words = json.dumps(about(row), ensure_ascii=False, indent=1, sort_keys=True)
        yield (
            row,
            {
                "json": words.encode(),
                "txt": "\n".join(captions).encode(),
                kind: encode_video(frames, row["fps"], kind),
            },
        )


def _frames(
    snapshot: Snapshot, batch: pa.Table, tokenizer: VideoTokenizer | None
) -> Iterator[tuple[Row, np.ndarray | VideoError]]:
    if tokenizer is None:
        yield from decode_clips(snapshot, batch.to_pylist(), encoded_frames, fetch_all=True)
        return
    for row, codes in zip(batch.to_pylist(), read_clips(snapshot, batch), strict=True):
        frames, outside = decode_codes(tokenizer, codes)
        yield row, VideoError("bad_codes", f"{outside} codes are outside the codebook") if outside else frames


def _video_name(row: Row, export: Export) -> str:
    return f"{file_name(row['clip_id'])}.{_kind(row, export)}"


def _kind(row: Row, export: Export) -> VideoFormat:
    return "png" if row["t"] == 1 else export.clips


def _lacking(out: str, export: Export, done: Exported) -> JobError:
    reasons = Counter(done.missing.values()).most_common()
    told = "\n  ".join(f"{reason} ({number} clips)" for reason, number in reasons[:_NAMED])
    more = f"\n  and {len(reasons) - _NAMED} more sources" if len(reasons) > _NAMED else ""
    remedy = (
        "`lumos data verify` says more, and `lumos data repair` makes damaged shards again"
        if export.frames == "codes"
        else "put the sources back where they were and give the same command again, or export what their codes show "
        "(--frames codes) to another place"
    )
    count, there = len(done.missing), done.made + done.before
    return JobError(
        f"{count} of {count + there} clips could not be exported to {out}{', the others are there' * (there > 0)}:\n  "
        f"{told}{more}\n{remedy}"
    )
