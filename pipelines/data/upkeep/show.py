"""Clips of a snapshot as their sources and as their codes show them, side by side: as a page, or one after another."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lumos.tokenizers import VideoTokenizer
from pipelines import storage
from pipelines.data.keys import source_of
from pipelines.data.reasons import parse_duplicate
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.columns import iterate
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.codes import decode_codes, encoded_frames, find_clips, read_clips, snapshot_tokenizer
from pipelines.data.upkeep.stills import decode_clips
from pipelines.decoding.errors import VideoError
from pipelines.errors import UserError
from pipelines.media import encode_video, psnr
from pipelines.pages.render import render_page

SUFFIXES = (".html", ".mp4")  # of what is written
_GAP = 4  # px between the two pictures
_BAR, _LETTER = 28, 9  # px: of words above them in an mp4, and of a letter, at most
_GREY = 96


@dataclass(frozen=True)
class Shown:
    """A clip, as its source shows it and as its codes do."""

    row: Row  # of its shard, with ``path``, ``start_s`` and ``end_s`` of the ledger
    source: NDArray[np.uint8] | str  # frames [T, H, W, 3], or why there are none
    decoded: NDArray[np.uint8]  # likewise
    outside: int  # of its codes, outside the codebook
    psnr: float | None  # dB of the one against the other

    @property
    def problem(self) -> str:
        """What is wrong with its codes, if anything is."""
        count = len(self.row["codes"])
        return f"{self.outside} of {count} codes are outside the codebook; the code 0 stands for them" * (
            self.outside > 0
        )

    @property
    def caption(self) -> str:
        """Its first caption, or nothing."""
        return self.row["captions"][0]["text"] if self.row["captions"] else ""

    @property
    def frames(self) -> NDArray[np.uint8]:
        """Both side by side; where there is no source, what the codes show."""
        if isinstance(self.source, str):
            return self.decoded
        gap = np.full((*self.decoded.shape[:2], _GAP, 3), _GREY, np.uint8)
        return np.concatenate([self.source, gap, self.decoded], axis=2)

    @property
    def video(self) -> bytes:
        """Of ``frames``: an mp4, or of an image a PNG."""
        return encode_video(self.frames, self.row["fps"], "mp4" if len(self.decoded) > 1 else "png")


def choose_keys(snapshot: Snapshot, names: Sequence[str], count: int) -> list[str]:
    """Keys of kept clips: those named, or else some drawn by a hash of them.

    Names are keys (or how they begin), or paths of sources as the ledger has them, a copy's among them.

    Raises:
        UserError: a name is of no kept clip.
    """
    if names:
        return _named(snapshot, names)
    keys = sorted(
        iterate(find_clips(snapshot)["clip_id"]), key=lambda key: hashlib.sha256(f"show:{key}".encode()).digest()
    )
    turns: Counter[str] = Counter()  # of each source, so that many are seen
    ranked = []
    for key in keys:
        turns[source_of(key)] += 1
        ranked.append((turns[source_of(key)], key))
    return [key for _, key in sorted(ranked, key=itemgetter(0))[:count]]


def show_clips(snapshot: Snapshot, keys: Sequence[str], tokenizer: VideoTokenizer) -> list[Shown]:
    """Published clips with source and codes; the one of the lowest PSNR first, those without a source last."""
    found = find_clips(snapshot)
    rows = read_clips(snapshot, found.filter(pc.is_in(found["clip_id"], pa.array(keys, pa.string()))))
    places = {row["key"]: row for row in _ledger_rows(snapshot, keys)}
    shown = []
    for row, frames in decode_clips(snapshot, rows, encoded_frames):
        decoded, outside = decode_codes(tokenizer, row)
        source: NDArray[np.uint8] | str
        value: float | None
        if isinstance(frames, VideoError):
            source, value = f"no source, {frames.code.replace('_', ' ')}: {frames.detail}", None
        else:
            source, value = frames, psnr(frames, decoded)
        shown.append(Shown(row | places[row["key"]], source, decoded, outside, value))
    return sorted(shown, key=lambda clip: (clip.psnr is None, clip.psnr or 0, clip.row["key"]))


def need_tokenizer(snapshot: Snapshot, path: str | None) -> VideoTokenizer:
    """The tokenizer of a snapshot; a ``UserError`` where it is not at hand."""
    loaded = snapshot_tokenizer(snapshot, path)
    if loaded is None:
        info = snapshot.manifest.tokenizer
        raise UserError(
            f"{snapshot.uri} was made by the tokenizer {info.kind} with weights {info.weights_hash}, which is not the "
            "one in the package: name its file or folder with --tokenizer"
        )
    return loaded


def _ledger_rows(snapshot: Snapshot, keys: Sequence[str]) -> list[Row]:
    wanted, rows = pa.array(keys, pa.string()), list[Row]()
    for piece in snapshot.ledger_pieces(["key", "path", "start_s", "end_s"]):
        rows += piece.filter(pc.is_in(piece["key"], wanted)).to_pylist()
    return rows


def _named(snapshot: Snapshot, names: Sequence[str]) -> list[str]:
    """Keys of the kept clips that are named."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    _look_up(snapshot, rows)
    twins = {(parse_duplicate(row["reason"]) or ("", ""))[1] for found in rows.values() for row in found}
    originals: dict[str, list[Row]] = {name: [] for name in twins - {""}}
    _look_up(snapshot, originals)
    keys: dict[str, None] = {}
    for name, found in rows.items():
        if not found:
            raise UserError(
                f"{snapshot.uri} has no clip {name!r}: name a key (or how one begins) or a path as the ledger has it; "
                "`lumos data report` lists them"
            )
        exact = [twin[1] for row in found if (twin := parse_duplicate(row["reason"])) and twin[0] == "exact"]
        every = [*found, *(row for source_id in exact for row in originals[source_id])]
        kept = [row["key"] for row in every if row["status"] == "kept"]
        if not kept:
            told = "; ".join(dict.fromkeys(f"{row['status']}: {row['reason']}" for row in every[:3]))
            raise UserError(f"no clip of {name!r} was kept, and so none has codes ({told}): name one that was")
        keys |= dict.fromkeys(kept)
    return list(keys)


def _look_up(snapshot: Snapshot, rows: dict[str, list[Row]]) -> None:
    """Add the ledger's rows of each name: a path, or what a key begins with."""
    for piece in snapshot.ledger_pieces(["key", "path", "status", "reason"]) if rows else ():
        for name, found in rows.items():
            same = pc.or_(pc.equal(piece["path"], name), pc.starts_with(piece["key"], name))
            found += piece.filter(same).to_pylist()


def write_shown(out: Path, snapshot: Snapshot, clips: Sequence[Shown]) -> None:
    """Write clips as a page that needs no other file, or as an mp4 in which they follow one another."""
    if out.suffix == ".mp4":
        storage.write_bytes_atomic(str(out), _reel(clips))
        return
    known = [clip.psnr for clip in clips if clip.psnr is not None]
    page = render_page(
        "data_show.html.j2",
        manifest=snapshot.manifest,
        clips=clips,
        mean=sum(known) / len(known) if known else None,
        lowest=min(known, default=None),
    )
    storage.write_bytes_atomic(str(out), page.encode())


def _reel(clips: Sequence[Shown]) -> bytes:
    """An mp4 at the rate of the first clip, each clip under a line that names it; small ones are in the middle."""
    pictures = [clip.frames for clip in clips]
    height, width = (max(each.shape[axis] for each in pictures) for axis in (1, 2))
    width = max(width, 480) + width % 2
    frames = []
    for clip, picture in zip(clips, pictures, strict=True):
        length, own_height, own_width, _ = picture.shape
        canvas = np.zeros((length, height + _BAR + height % 2, width, 3), np.uint8)
        top, left = _BAR + (height - own_height) // 2, (width - own_width) // 2
        canvas[:, top : top + own_height, left : left + own_width] = picture
        words = "codes alone" if clip.psnr is None else f"source | codes  {clip.psnr:.1f} dB"
        words += f"{'  CODES OUTSIDE THE CODEBOOK' if clip.outside else ''}  {clip.row['start_s']:.1f} s  "
        room = max(8, width // _LETTER - len(words))
        line = words + clip.row["path"].encode("ascii", "replace").decode()[-room:]
        cv2.putText(canvas[0], line, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        canvas[:, :_BAR] = canvas[0, :_BAR]
        frames.append(canvas)
    return encode_video(np.concatenate(frames), clips[0].row["fps"])
