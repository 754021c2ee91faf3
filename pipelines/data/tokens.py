"""The token stage: the frames of kept clips, decoded once more at their final size, become grids of codes."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lumos.tokenizers import TokenizerConfig, VideoTokenizer, load_video_tokenizer
from pipelines import storage
from pipelines.data.config import CurateConfig, TokenConfig
from pipelines.data.decode import CrashLog, DecodeChild, DecodeJob
from pipelines.data.runner import Row, Stage
from pipelines.data.settings import DecodeConfig
from pipelines.data.snapshot import TokenizerInfo
from pipelines.data.split import LocalFiles
from pipelines.data.video import ClipRequest, VideoError

TOKEN_INPUTS = pa.schema(
    [
        ("work_key", pa.string()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("rotation", pa.int16()),
        ("picture", pa.list_(pa.int32())),
        ("pixel_aspect", pa.float64()),
        ("source_frames", pa.int64()),
        ("origin_s", pa.float64()),
        ("clean_clock", pa.bool_()),
    ]
)
TOKENIZED = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("fps", pa.float32()),
        pa.field("t", pa.int16()),
        pa.field("h", pa.int16()),
        pa.field("w", pa.int16()),
        pa.field("codes", pa.list_(pa.uint16())),
        pa.field("codes_sha256", pa.string()),
        pa.field("error", pa.string()),
    ]
)
# Of the split stage's row, what decoding a clip takes.
REQUEST_COLUMNS = (
    "start_s",
    "end_s",
    "rotation",
    "picture",
    "pixel_aspect",
    "source_frames",
    "origin_s",
    "clean_clock",
)


@dataclass(frozen=True)
class ClipShape:
    """What of a clip is encoded."""

    num_frames: int
    width: int  # px
    height: int

    def work_key(self, clip_key: str, picture: Sequence[int]) -> str:
        """Names the work of encoding a clip so; the picture is the part of its frame that counts."""
        return f"{clip_key}@{self.num_frames}x{self.width}x{self.height}+{','.join(map(str, picture))}"


def plan_shape(duration: float, aspect: float, config: TokenConfig) -> ClipShape | None:
    """The longest allowed length that a clip fills, at the size nearest to its aspect ratio; None if it is too short.

    Args:
        duration: Seconds.
        aspect: Width / height of the picture.
        config: What is allowed.
    """
    available = math.floor(duration * config.fps + 0.01)  # spans are rounded to milliseconds
    lengths = [count for count in config.num_frames if count <= available]
    if not lengths:
        return None
    width, height = min(
        config.frame_sizes, key=lambda size: (round(abs(math.log(size[0] / size[1] / aspect)), 6), -size[0] * size[1])
    )
    return ClipShape(max(lengths), width, height)


def tokenizer_info(tokenizer: VideoTokenizer) -> TokenizerInfo:
    """What identifies a tokenizer."""
    return TokenizerInfo(
        kind=tokenizer.kind,
        codebook_size=tokenizer.codebook_size,
        compression=tokenizer.compression,
        weights_hash=tokenizer.weights_hash,
    )


class TokenFunction:
    """Decodes clips in a child process and encodes them, in batches of one fixed shape."""

    def __init__(self, uri: str, *, config: TokenConfig, decode: DecodeConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.tokenizer = load_video_tokenizer(config.tokenizer)
        self.child = DecodeChild(decode, CrashLog(storage.join(uri, "crashes")))

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Codes of each clip, or why there are none."""
        files = LocalFiles()
        last_use = {row["uri"]: index for index, row in enumerate(rows)}
        waiting: dict[tuple[int, ...], list[tuple[Row, NDArray[np.uint8]]]] = defaultdict(list)
        done: list[Row] = []
        for index, (row, result) in enumerate(zip(rows, self.child.run(self._jobs(rows, files)), strict=True)):
            if last_use[row["uri"]] == index:
                files.release(row["uri"])
            if isinstance(result, VideoError):
                done.append({"work_key": row["work_key"], "key": row["key"], "error": result.reason})
                continue
            same = waiting[result.shape]
            same.append((row, result))
            if len(same) == self.config.batch_size:
                done += self._encode(waiting.pop(result.shape))
        for same in waiting.values():
            done += self._encode(same)
        return done

    def _jobs(self, rows: Sequence[Row], files: LocalFiles) -> Iterator[DecodeJob | VideoError]:
        for row in rows:
            try:
                path = files.path(row["uri"])
            except VideoError as error:
                yield error
                continue
            request = ClipRequest(
                path=path,
                fps=self.config.fps,
                num_frames=row["num_frames"],
                width=row["width"],
                height=row["height"],
                **{name: row[name] for name in REQUEST_COLUMNS},
            )
            yield DecodeJob(row["work_key"], "clip", {"request": request}, after_crash={"use_decord": False})

    def _encode(self, clips: Sequence[tuple[Row, NDArray[np.uint8]]]) -> list[Row]:
        frames = np.stack([frames for _, frames in clips])
        short = self.config.batch_size - len(clips)
        # Products of another shape may round otherwise, so a batch that lacks clips is filled up.
        filled = np.concatenate([frames, np.zeros((short, *frames.shape[1:]), np.uint8)]) if short else frames
        codes = self.tokenizer.encode(torch.from_numpy(filled)).numpy()[: len(clips)]
        return [self._row(row, grid) for (row, _), grid in zip(clips, codes, strict=True)]

    def _row(self, row: Row, grid: NDArray[Any]) -> Row:
        flat = grid.astype("<u2").ravel()
        if not np.array_equal(flat, grid.ravel()):
            raise ValueError(f"the tokenizer gave codes outside 0..65535: {grid.min()}..{grid.max()}")
        t, h, w = grid.shape
        digest = hashlib.sha256(flat.tobytes()).hexdigest()
        shape = {"t": t, "h": h, "w": w, "fps": self.config.fps}
        return {"work_key": row["work_key"], "key": row["key"], **shape, "codes": flat, "codes_sha256": digest}


def tokens_stage(config: CurateConfig, tokenizer: TokenizerInfo) -> Stage:
    """The stage that encodes.

    Its table is not named by where the weights lie and which device computes, nor by the allowed shapes: the shape
    chosen for a clip is in its key, so that other buckets redo only the clips that change theirs.
    """
    tokens = config.tokens
    settings = {
        "version": 1,
        "fps": tokens.fps,
        "batch_size": tokens.batch_size,
        "tokenizer": [tokenizer.kind, tokenizer.weights_hash],
    }
    threads = max(1, int(config.resources.cpus_per_worker))
    return Stage(
        name="tokens",
        settings=settings,
        schema=TOKENIZED,
        function=partial(TokenFunction, config=tokens, decode=config.decode, threads=threads),
        rows_per_part=64,
        cpus=config.resources.cpus_per_worker,
        gpus=config.resources.gpus_per_tokenizer,
    )


def load_tokenizer_info(config: TokenizerConfig) -> TokenizerInfo:
    """Load a tokenizer on the CPU to see that it works, and what it is.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
    """
    return tokenizer_info(load_video_tokenizer(TokenizerConfig(kind=config.kind, path=config.path, device="cpu")))
