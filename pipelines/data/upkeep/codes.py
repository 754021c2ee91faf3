"""Published clips as pictures: their codes found in the shards of a snapshot, and decoded by the tokenizer it names."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from lumos.compression import CELL, num_source_frames
from lumos.config import parse_tokenizer_kind
from lumos.tokenizers import TokenizerConfig, VideoTokenizer
from lumos.tokenizers.fsq import EMBEDDED_WEIGHTS
from pipelines.data.snapshot.read import Snapshot
from pipelines.data.stage.columns import sort
from pipelines.data.stage.stage import Row
from pipelines.data.video.frames import Wanted
from pipelines.errors import UserError
from pipelines.tokenizers import load_tokenizer

_FOUND = pa.schema([("clip_id", pa.string()), ("shard", pa.int32()), ("place", pa.int64())])


def find_clips(snapshot: Snapshot, columns: Sequence[str] = ()) -> pa.Table:
    """All published clips, sorted by ``clip_id``: ``columns`` of each, and where it is (``shard``, ``place``)."""
    tables = []
    shards = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    for number, shard in enumerate(shards):
        table = snapshot.read_shard(shard, ["clip_id", *columns])
        table = table.append_column(_FOUND.field("shard"), pa.array(np.full(table.num_rows, number, np.int32)))
        tables.append(table.append_column(_FOUND.field("place"), pa.array(np.arange(table.num_rows))))
    return sort(pa.concat_tables(tables), ["clip_id"]) if tables else _FOUND.empty_table()


def read_clips(snapshot: Snapshot, found: pa.Table) -> list[Row]:
    """The rows of some clips as ``find_clips`` found them, with their codes and ``key``, in the same order."""
    shards = [shard for bucket in snapshot.manifest.buckets for shard in bucket.shards]
    rows: dict[str, Row] = {}
    for number in pc.unique(found["shard"]).to_pylist():
        places = found.filter(pc.equal(found["shard"], number))["place"]
        for row in snapshot.read_shard(shards[number]).take(places).to_pylist():
            rows[row["clip_id"]] = row | {"key": row["clip_id"]}
    return [rows[key] for key in found["clip_id"].to_pylist()]


def snapshot_tokenizer(snapshot: Snapshot, path: str | None) -> VideoTokenizer | None:
    """The tokenizer of a snapshot, of a file or folder; None if none is named and the embedded one is another.

    Raises:
        UserError: the one named is another, or none.
    """
    info = snapshot.manifest.tokenizer
    if path is None and info.kind not in EMBEDDED_WEIGHTS:
        return None
    try:
        tokenizer = load_tokenizer(TokenizerConfig(kind=parse_tokenizer_kind(info.kind), path=path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--tokenizer: {error}") from error
    if tokenizer.weights_hash != info.weights_hash:
        if path is None:
            return None
        raise UserError(
            f"the snapshot was made by the tokenizer {info.kind} with weights {info.weights_hash}, this one has "
            f"{tokenizer.weights_hash}: name its file with --tokenizer"
        )
    return tokenizer


def encoded_frames(clip: Row, _: Row) -> Wanted:
    """The frames of a clip that its codes stand for, for ``stills.decode_clips``."""
    return Wanted(clip["fps"], num_source_frames(clip["t"]), CELL * clip["w"], CELL * clip["h"])


def decode_codes(tokenizer: VideoTokenizer, clip: Row) -> tuple[NDArray[np.uint8], int]:
    """What the codes of a clip show [T, H, W, 3], and how many of them are outside the codebook; 0 stands for these.

    Raises:
        UserError: they do not fill their grid.
    """
    codes = np.array(clip["codes"], np.int64)
    if len(codes) != clip["t"] * clip["h"] * clip["w"]:
        raise UserError(
            f"clip {clip['key']} has {len(codes)} codes for a grid of {clip['t']}x{clip['h']}x{clip['w']}: its shard "
            "is damaged; `lumos data verify` names it, and `lumos data repair` makes it again"
        )
    outside = codes >= tokenizer.codebook_size
    grid = np.where(outside, 0, codes).reshape(1, clip["t"], clip["h"], clip["w"])
    return tokenizer.decode(torch.from_numpy(grid))[0].numpy(), int(outside.sum())
