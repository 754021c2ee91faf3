"""Some published clips against their sources: decoded and encoded once more, and compared with the codes on disk."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lumos.compression import CELL, num_source_frames
from lumos.tokenizers import TokenizerConfig, VideoTokenizer, load_video_tokenizer
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.stage import Row
from pipelines.data.upkeep.stills import decode_clips
from pipelines.data.video.frames import Wanted
from pipelines.data.video.reader import MISMATCH, VideoError
from pipelines.errors import UserError
from pipelines.media import psnr

# By how much, dB, codes on disk may show their clip worse than codes made now; other devices and versions round
# otherwise, but codes of another clip are far off.
_TOLERANCE = 3.0


@dataclass(frozen=True)
class Recheck:
    """What was found of the clips that were looked at."""

    psnr: dict[str, float]  # dB of the codes on disk, decoded, against the source, by clip
    equal: float  # share of codes on disk that equal those made now
    skipped: dict[str, str]  # clips whose source is not at hand, and why
    problems: tuple[str, ...]  # one sentence each

    def __str__(self) -> str:
        lines = []
        if self.psnr:
            values = list(self.psnr.values())
            lines.append(
                f"{len(values)} clips decoded back: {np.mean(values):.1f} dB (lowest {min(values):.1f}); "
                f"{100 * self.equal:.2f} % of codes are what the tokenizer gives now"
            )
        lines += [f"not decoded back: {key}: {why}" for key, why in self.skipped.items()]
        return "\n".join([*lines, *self.problems])


def recheck(snapshot: Snapshot, count: int, tokenizer: str | None = None) -> Recheck:
    """Decode and encode some clips anew.

    Args:
        snapshot: Whose clips; it must lie in its dataset, as the stages know where the sources are.
        count: Clips, chosen by a hash of their ids.
        tokenizer: File or folder of the one that made the snapshot; None for the embedded one.

    Raises:
        UserError: if the tokenizer that was named is another one, or not to be had.
    """
    loaded = _load(snapshot, tokenizer)
    if loaded is None:
        return Recheck({}, 0.0, {"all clips": "the tokenizer that made them is none of ours: name --tokenizer"}, ())
    clips = _choose(snapshot, count)
    found: dict[str, float] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    same: list[bool] = []
    for clip, frames in decode_clips(snapshot, clips, _encoded):
        if isinstance(frames, VideoError):
            if frames.code == MISMATCH:
                problems.append(f"{clip['key']} cannot be checked: {frames.detail}")
            else:
                skipped[clip["key"]] = frames.reason
            continue
        shape = (1, clip["t"], clip["h"], clip["w"])
        stored = torch.from_numpy(np.array(clip["codes"], np.int64).reshape(shape))
        made = loaded.encode(torch.from_numpy(frames)[None])
        same += (stored == made).flatten().tolist()
        found[clip["key"]] = psnr(frames, loaded.decode(stored)[0].numpy())
        now = psnr(frames, loaded.decode(made)[0].numpy())
        if found[clip["key"]] < now - _TOLERANCE:
            compared = f"{found[clip['key']]:.1f} dB, codes made now {now:.1f} dB"
            problems.append(f"codes of {clip['key']} do not show their clip: {compared}")
    return Recheck(found, float(np.mean(same)) if same else 0.0, skipped, tuple(problems))


def _load(snapshot: Snapshot, path: str | None) -> VideoTokenizer | None:
    """The tokenizer; None if none was named and the embedded one is another."""
    info = snapshot.manifest.tokenizer
    kind: Literal["fsq", "cosmos"] = "cosmos" if info.kind == "cosmos" else "fsq"
    if kind == "cosmos" and path is None:
        return None
    try:
        tokenizer = load_video_tokenizer(TokenizerConfig(kind=kind, path=path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--tokenizer: {error}") from error
    if tokenizer.weights_hash != info.weights_hash:
        if path is None:
            return None
        raise UserError(
            f"the snapshot was made by the tokenizer {info.kind} with weights {info.weights_hash}, this one has "
            f"{tokenizer.weights_hash}: name its file with --tokenizer, or give --sample 0"
        )
    return tokenizer


def _choose(snapshot: Snapshot, count: int) -> list[Row]:
    """Rows of the clips whose hash is lowest, with codes, in the order of their sources."""
    ranked = []
    for bucket in snapshot.manifest.buckets:
        for shard in bucket.shards:
            for place, key in enumerate(snapshot.read_shard(shard, ["clip_id"])["clip_id"].to_pylist()):
                ranked.append((hashlib.sha256(f"recheck:{key}".encode()).digest(), shard, place))
        ranked = sorted(ranked, key=lambda item: item[0])[:count]
    chosen = []
    for shard in dict.fromkeys(shard for _, shard, _ in ranked):
        table = snapshot.read_shard(shard)
        chosen += table.take([place for _, own, place in ranked if own == shard]).to_pylist()
    return [row | {"key": row["clip_id"]} for row in sorted(chosen, key=lambda row: row["clip_id"])]


def _encoded(clip: Row, _: Row) -> Wanted:
    """The frames of a clip that were encoded."""
    return Wanted(clip["fps"], num_source_frames(clip["t"]), CELL * clip["w"], CELL * clip["h"])
