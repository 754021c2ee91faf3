"""The features stage: frames of clips seen by CLIP and a text detector, and the scores that follow from that.

The table holds features, not verdicts of heads: another head, caption or threshold costs no pass of the large model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipelines.data.config import CurateConfig
from pipelines.data.keys import picture_keys, text_key
from pipelines.data.models import text_detector
from pipelines.data.models.heads import Head
from pipelines.data.models.open_clip import (
    check_open_clip,
    file_hash,
    in_batches,
    load_open_clip,
    open_clip_hash,
    scale_shorter_side,
)
from pipelines.data.models.text_detector import TextDetector
from pipelines.data.settings import FeatureConfig, OpenClipConfig
from pipelines.data.stage.columns import iterate, take
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.run import Check, Run, Step, check_device, read_in_order
from pipelines.data.video.looks import decode_jpeg, look_inputs, looks_settings, read_looks
from pipelines.errors import UserError

FEATURES = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("clip", pa.binary()),  # float16 CLIP features of each frame, unit length, one after another
        pa.field("text_area", pa.float64()),
        pa.field("error", pa.string()),
    ]
)
TEXT_INPUTS = pa.schema([("work_key", pa.string()), ("text", pa.string())])
TEXT_FEATURES = pa.schema([pa.field("work_key", pa.string(), nullable=False), ("clip", pa.binary())])  # likewise, one
_TEXT_SIDE = 480  # px of the shorter side of what the text detector reads
_KEY = "features.clip.weights"


class FeatureFunction:
    """Looks at clips."""

    def __init__(self, uri: str, *, config: FeatureConfig, threads: int) -> None:
        del uri  # nothing is recorded beside the table
        torch.set_num_threads(threads)
        self.config = config
        self.clip = load_open_clip(config.clip, _KEY) if config.clip.weights is not None else None
        self.text = TextDetector(config.text_detector) if config.text_detector is not None else None

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Features of each clip, or why there are none."""
        done, seen = [], []
        for row, looks in read_looks(rows):
            made: Row = {"work_key": row["work_key"], "key": row["key"], "error": looks.error}
            done.append(made)
            if looks.error:
                continue
            frames = [decode_jpeg(image) for image in looks.evenly(self.config.num_frames)]
            if self.text is not None:
                areas = [self.text.area(scale_shorter_side(frame, _TEXT_SIDE)) for frame in frames]
                made["text_area"] = round(float(np.mean(areas)), 6)
            if self.clip is not None:
                seen.append((made, self.clip.images(frames)))
        if self.clip is not None and seen:
            encode = partial(self.clip.model.encode_image, normalize=True)
            features = in_batches(encode, torch.cat([images for _, images in seen]), self.config.clip.batch_size)
            for (made, _), own in zip(seen, features.split([len(images) for _, images in seen]), strict=True):
                made["clip"] = pack_features(own)
        return done


def pack_features(features: torch.Tensor) -> bytes:
    """Float16 bytes of unit vectors [n, width]."""
    return features.cpu().to(torch.float16).numpy().astype("<f2").tobytes()


def unpack_features(data: bytes, width: int) -> NDArray[np.float32]:
    """What was packed: [n, width]."""
    return np.frombuffer(data, "<f2").reshape(-1, width).astype(np.float32)


class TextFunction:
    """CLIP features of captions."""

    def __init__(self, uri: str, *, config: OpenClipConfig, threads: int) -> None:
        del uri  # nothing is recorded beside the table
        torch.set_num_threads(threads)
        self.size = config.batch_size
        self.clip = load_open_clip(config, _KEY)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Features of each text; the model reads its first 77 tokens or so."""
        tokens = self.clip.tokenizer([row["text"] for row in rows]).to(self.clip.device)
        features = in_batches(partial(self.clip.model.encode_text, normalize=True), tokens, self.size)
        return [
            {"work_key": row["work_key"], "clip": pack_features(own[None])}
            for row, own in zip(rows, features, strict=True)
        ]


class FeatureScores:
    """From stored features to scores: heads over frames, and likeness to captions.

    Raises:
        UserError: a head's file is missing or of another kind.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self.heads: dict[str, Head] = {}
        if config.aesthetic_head is not None:
            self.heads["aesthetic"] = Head(config.aesthetic_head, "features.aesthetic_head", rectified=False)
        if config.nsfw_head is not None:
            self.heads["nsfw"] = Head(config.nsfw_head, "features.nsfw_head", rectified=True)

    def of_clip(self, row: Row) -> dict[str, float]:
        """Scores of a clip by its frames: aesthetic is their mean, nsfw their highest.

        Raises:
            UserError: the features have another width than a head wants.
        """
        scores = {"text_area": row["text_area"]} if row["text_area"] is not None else {}
        for name, head in self.heads.items():
            self._check_width(name, head, len(row["clip"]) // 2 // self.config.num_frames)
            values = head(unpack_features(row["clip"], head.width))
            scores[name] = round(float(values.max() if name == "nsfw" else values.mean()), 6)
        return scores

    def check(self) -> None:
        """Load the models, and see that the heads go with the features.

        Raises:
            UserError: if weights do not fit their architecture, or a head wants another number of features.
        """
        if self.config.text_detector is not None:
            TextDetector(self.config.text_detector)
        if self.config.clip.weights is not None:
            width = check_open_clip(self.config.clip, _KEY)
            for name, head in self.heads.items():
                self._check_width(name, head, width)

    def _check_width(self, name: str, head: Head, width: int) -> None:
        if width != head.width:
            raise UserError(
                f"features.{name}_head wants {head.width} features, but {self.config.clip.model} gives {width}: name "
                "the head that was trained on this model"
            )


def similarity(frames: bytes, texts: Sequence[bytes]) -> float:
    """Cosine of a clip's mean frame and the caption that fits it best; -1..1, 0.2-0.35 for good pairs of ViT-L-14."""
    width = len(texts[0]) // 2
    mean = unpack_features(frames, width).mean(axis=0)
    mean /= max(float(np.linalg.norm(mean)), 1e-6)
    return round(float(max(unpack_features(text, width)[0] @ mean for text in texts)), 6)


class Features(Step):
    """What models see in the clips kept so far.

    Raises:
        UserError: a model's file is not there.
    """

    def __init__(self, config: CurateConfig) -> None:
        features, resources = config.features, config.resources.of("features")
        settings: dict[str, Any] = {
            "version": 2,
            "looks": looks_settings(config.looks),
            "num_frames": features.num_frames,
        }
        if features.clip.weights is not None:
            settings["clip"] = open_clip_hash(features.clip, _KEY)
            settings["batch_size"] = features.clip.batch_size
        if features.text_detector is not None:
            settings["text"] = file_hash(features.text_detector, "features.text_detector", where=text_detector.WHERE)
        stage = Stage(
            name="features",
            settings=settings,
            schema=FEATURES,
            function=partial(FeatureFunction, config=features, threads=resources.threads),
            rows_per_part=64,
            resources=resources,
        )
        self.scores = FeatureScores(features)
        self.stages = (stage,)
        self.checks = (
            Check("features", self.scores.check, costly=True),
            Check("features", partial(check_device, "features.clip.device", features.clip.device)),
        )

    def apply(self, run: Run) -> None:
        """Look, and decide."""
        clips = run.clips
        kept = clips.verdicts.kept
        rows = clips.of(kept)
        inputs = look_inputs(rows)
        table = run.compute("features", inputs)
        clips.verdicts.mark("features", kept)
        for places, piece in table.pieces(["clip", "text_area", "error"], inputs["work_key"]):
            for index, row in zip(kept[places].tolist(), piece.to_pylist(), strict=True):
                if row["error"]:
                    clips.verdicts.set(index, "failed", row["error"])
                    continue
                for name, value in self.scores.of_clip(row).items():
                    clips.scores[name][index] = value
        clips.decide(run.config.bounds)


class Similarity(Step):
    """How well clips and their captions go together."""

    def __init__(self, config: CurateConfig) -> None:
        clip, resources = config.features.clip, config.resources.of("texts")
        stage = Stage(
            name="texts",
            settings={"version": 1, "clip": open_clip_hash(clip, _KEY), "batch_size": clip.batch_size},
            schema=TEXT_FEATURES,
            function=partial(TextFunction, config=clip, threads=resources.threads),
            rows_per_part=4096,
            resources=resources,
        )
        self.stages = (stage,)

    def apply(self, run: Run) -> None:
        """Read the captions, compare, and decide."""
        clips, kept = run.clips, run.clips.verdicts.kept
        captioned = kept[pc.greater(pc.list_value_length(run.captions.take(kept)), 0).to_numpy()]
        captions = run.captions.take(captioned)
        said = pc.struct_field(pc.list_flatten(captions), "text")
        hashes = pa.array((text_key(text) for text in iterate(said)), pa.string())
        keys = pc.unique(hashes)
        texts = take(said, pc.index_in(keys, hashes).to_numpy())
        table = run.compute("texts", pa.table([keys, texts], schema=TEXT_INPUTS))
        vectors = read_in_order(table, ["clip"], pa.chunked_array([keys]))["clip"]
        spoken = pc.index_in(hashes, keys).to_numpy()  # numbers of the captions' texts, clip after clip
        bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(captions).to_numpy())])
        rows = clips.of(captioned)
        for places, piece in run.table("features").pieces(["clip"], picture_keys(rows)):
            for place, seen in zip(places.tolist(), piece["clip"].to_pylist(), strict=True):
                numbers = spoken[bounds[place] : bounds[place + 1]]
                texts_of_clip = [vectors[number].as_py() for number in numbers.tolist()]
                clips.scores["similarity"][captioned[place]] = similarity(seen, texts_of_clip)
        clips.decide(run.config.bounds)
