"""The token stage: the frames of kept clips, decoded once more at their final size, become grids of codes."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from lumos.tokenizers import TokenizerConfig
from pipelines.data.config import CurateConfig, TokenConfig
from pipelines.data.keys import token_keys
from pipelines.data.reasons import reason_of
from pipelines.data.scores import scores_of
from pipelines.data.settings import DecodeConfig
from pipelines.data.snapshot.read import TokenizerInfo
from pipelines.data.stage.columns import iterate
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.stage.table import PART
from pipelines.data.steps.run import Check, Run, Step, check_device, read_in_order
from pipelines.data.video.frames import CLIP_INPUTS, ClipReader, Wanted, clip_inputs
from pipelines.decoding.errors import VideoError
from pipelines.media import psnr, ssim
from pipelines.tokenizers import load_tokenizer

TOKEN_INPUTS = pa.schema(
    [
        *CLIP_INPUTS,
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("decode_back", pa.bool_()),  # whether the codes are decoded again, for psnr and ssim
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
        pa.field("psnr", pa.float64()),  # dB of the decoded codes against what was encoded, of a sample of the clips
        pa.field("ssim", pa.float64()),  # likewise, of luma, mean over the frames
        pa.field("error", pa.string()),
    ]
)


def token_inputs(clips: pa.Table, shapes: NDArray[np.int32], decode_back_share: float) -> pa.Table:
    """``TOKEN_INPUTS`` of clips (rows of the split stage, with ``uri`` and ``split_part``) and of a shape for each.

    Shapes are frames, width and height, [n, 3]; the codes of a share of the clips are decoded again.
    """
    sampled = pa.array([is_sampled(key, decode_back_share) for key in iterate(clips["key"])], pa.bool_())
    inputs = clip_inputs(clips, token_keys(clips, shapes, sampled))
    for name, column in zip(("num_frames", "width", "height"), shapes.T, strict=True):
        inputs = inputs.append_column(name, pa.array(column))
    return inputs.append_column("decode_back", sampled)


class TokenFunction:
    """Decodes clips in a child process and encodes them, in batches of one fixed shape."""

    def __init__(self, uri: str, *, config: TokenConfig, decode: DecodeConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.reader = ClipReader(uri, decode)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Codes of each clip, or why there are none."""
        waiting: dict[tuple[int, ...], list[tuple[Row, NDArray[np.uint8]]]] = defaultdict(list)
        done: list[Row] = []
        for row, result in self.reader.read(rows, self._wanted):
            if isinstance(result, VideoError):
                done.append({"work_key": row["work_key"], "key": row["key"], "error": reason_of(result)})
                continue
            same = waiting[result.shape]
            same.append((row, result))
            if len(same) == self.config.batch_size:
                done += self._encode(waiting.pop(result.shape))
        for same in waiting.values():
            done += self._encode(same)
        return done

    def _wanted(self, row: Row) -> Wanted:
        return Wanted(self.config.fps, row["num_frames"], row["width"], row["height"])

    def _encode(self, clips: Sequence[tuple[Row, NDArray[np.uint8]]]) -> list[Row]:
        frames = np.stack([frames for _, frames in clips])
        short = self.config.batch_size - len(clips)
        # Products of another shape may round otherwise, so a batch that lacks clips is filled up.
        filled = np.concatenate([frames, np.zeros((short, *frames.shape[1:]), np.uint8)]) if short else frames
        codes = self.tokenizer.encode(torch.from_numpy(filled)).numpy()[: len(clips)]
        return [self._row(row, frames, grid) for (row, frames), grid in zip(clips, codes, strict=True)]

    def _row(self, row: Row, frames: NDArray[np.uint8], grid: NDArray[Any]) -> Row:
        flat = grid.astype("<u2").ravel()
        if not np.array_equal(flat, grid.ravel()):
            raise ValueError(f"the tokenizer gave codes outside 0..65535: {grid.min()}..{grid.max()}")
        t, h, w = grid.shape
        digest = hashlib.sha256(flat.tobytes()).hexdigest()
        made: Row = {"work_key": row["work_key"], "key": row["key"], "fps": self.config.fps, "t": t, "h": h, "w": w}
        if row["decode_back"]:
            decoded = self.tokenizer.decode(torch.from_numpy(grid)[None])[0].numpy()
            made["psnr"] = round(psnr(frames, decoded), 3)
            made["ssim"] = round(float(np.mean(list(map(ssim, frames, decoded)))), 4)
        return made | {"codes": flat, "codes_sha256": digest}


def is_sampled(key: str, share: float) -> bool:
    """Whether a clip belongs to a sample of that share: a pure function of its key."""
    return int.from_bytes(hashlib.sha256(f"sample:{key}".encode()).digest()[:8], "big") < share * 2**64


def tokens_stage(config: CurateConfig, tokenizer: TokenizerInfo) -> Stage:
    """The stage that encodes.

    Its table is not named by where the weights lie and which device computes, nor by the allowed shapes: the shape
    chosen for a clip is in its key, so that other buckets redo only the clips that change theirs.
    """
    tokens, resources = config.tokens, config.resources.of("tokens")
    return Stage(
        name="tokens",
        settings={
            "version": 3,
            "fps": tokens.fps,
            "batch_size": tokens.batch_size,
            "tokenizer": [tokenizer.kind, tokenizer.weights_hash],
        },
        schema=TOKENIZED,
        function=partial(TokenFunction, config=tokens, decode=config.decode, threads=resources.threads),
        rows_per_part=64,
        file_column="uri",
        resources=resources,
    )


def load_tokenizer_info(config: TokenizerConfig) -> TokenizerInfo:
    """Load a tokenizer on the CPU to see that it works, and what it is.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be.
    """
    made = load_tokenizer(replace(config, device="cpu"))
    return TokenizerInfo(made.kind, made.codebook_size, made.compression, made.weights_hash)


class Tokenize(Step):
    """Encodes the clips kept to the end."""

    def __init__(self, config: CurateConfig, tokenizer: TokenizerInfo) -> None:
        self.stages = (tokens_stage(config, tokenizer),)
        device = config.tokens.tokenizer.device
        self.checks = (Check("tokens", partial(check_device, "tokens.tokenizer.device", device)),)

    def apply(self, run: Run) -> None:
        """Encode what is new; of codes, only their hashes are read."""
        clips, kept = run.clips, run.clips.verdicts.kept
        inputs = token_inputs(clips.of(kept), clips.shapes[kept], run.config.tokens.decode_back_share)
        measured = scores_of("tokens")
        columns = ["fps", "t", "h", "w", "codes_sha256", *(score.name for score in measured), "error", PART]
        table = run.compute("tokens", inputs)
        parts = table.parts()
        made = read_in_order(table, columns, inputs["work_key"], parts=parts)
        clips.verdicts.mark("tokens", kept)
        for score in measured:
            clips.scores[score.name][kept] = made[score.name].to_numpy()
        for place in np.flatnonzero(made["error"].is_valid().to_numpy()).tolist():
            clips.verdicts.set(int(kept[place]), "failed", made["error"][place].as_py())
        files = pa.DictionaryArray.from_arrays(made[PART].combine_chunks(), pa.array(parts, pa.string()))
        run.tokens = made.drop_columns([PART]).append_column("file", files).append_column("clip", pa.array(kept))
