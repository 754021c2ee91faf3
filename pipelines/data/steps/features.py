"""The features stage: frames of clips seen by CLIP and a text detector, and the scores that follow from that.

The table holds features, not verdicts of heads: another head, caption or threshold costs no pass of the large model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from pipelines.data.model_settings import FeatureConfig, OpenClipConfig
from pipelines.data.models.open_clip import check_open_clip, file_hash, load_open_clip, open_clip_hash
from pipelines.data.settings import DecodeConfig, StageResources
from pipelines.data.stage.run import Row, Stage
from pipelines.data.video.frames import CLIP_INPUTS, ClipReader, evenly
from pipelines.data.video.reader import VideoError
from pipelines.errors import UserError

FEATURE_INPUTS = CLIP_INPUTS
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
TEXT_FEATURES = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("clip", pa.binary()),  # float16, unit length
    ]
)
_SIDE = 224  # px of the shorter side that frames are decoded at, and more for what the text detector reads
_TEXT_SIDE = 480
_TEXT_MULTIPLE = 32  # px that divide the sides of the text detector's input
_PIXEL_THRESHOLD, _BOX_THRESHOLD, _UNCLIP = 0.3, 0.6, 1.5  # as the paper and PaddleOCR set them
_MAX_BOXES, _MIN_SIDE = 1000, 3.0
_TEXT_MEAN = (122.68, 116.67, 104.01)  # of B, G, R in this order, as these models were trained
_KEY = "features.clip.weights"
_HEAD_WHERE = (
    "take one that was trained on the features of features.clip: sa_0_4_vit_l_14_linear.pth from "
    "github.com/LAION-AI/aesthetic-predictor for OpenAI's ViT-L-14, h14_nsfw.pth from github.com/LAION-AI/"
    "CLIP-based-NSFW-Detector for LAION's ViT-H-14, or your own"
)
_TEXT_WHERE = "take a DB text detection model in ONNX form from github.com/opencv/opencv_zoo (text_detection_*)"


class TextDetector:
    """Share of a picture that text covers, by a differentiable-binarization network (Liao et al. 2020, 1911.08947).

    Raises:
        UserError: the file cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        try:
            self._net = cv2.dnn.readNetFromONNX(path)
        except cv2.error as error:
            raise UserError(f"features.text_detector {path} cannot be loaded as ONNX: {error.err}") from error

    def area(self, frame: NDArray[np.uint8]) -> float:
        """Share of an RGB frame [height, width, 3] inside the boxes found."""
        height, width = (max(1, round(side / _TEXT_MULTIPLE)) * _TEXT_MULTIPLE for side in frame.shape[:2])
        picture = np.ascontiguousarray(frame[..., ::-1])
        self._net.setInput(cv2.dnn.blobFromImage(picture, 1 / 255, (width, height), _TEXT_MEAN))
        likely = np.asarray(self._net.forward(), np.float32).reshape(height, width)
        return text_share(likely)


def text_share(likely: NDArray[np.float32]) -> float:
    """Share of a picture inside boxes of text.

    The network marks shrunk boxes; each is grown again by area * 1.5 / perimeter on every side, as it was trained.

    Args:
        likely: Probability of (the inner part of) text, [height, width].
    """
    covered = np.zeros(likely.shape, np.uint8)
    marks = (likely > _PIXEL_THRESHOLD).astype(np.uint8)
    contours, _ = cv2.findContours(marks, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    for contour in sorted(contours, key=len, reverse=True)[:_MAX_BOXES]:
        left, top, width, height = cv2.boundingRect(contour)
        inside = np.zeros((height, width), np.uint8)
        cv2.fillPoly(inside, [np.asarray(contour) - (left, top)], 1)
        part = likely[top : top + height, left : left + width]
        centre, (long, short), angle = cv2.minAreaRect(contour)
        if min(long, short) < _MIN_SIDE or float(part[inside > 0].mean()) < _BOX_THRESHOLD:
            continue
        growth = 2 * _UNCLIP * long * short / (2 * (long + short))
        grown = cv2.boxPoints((centre, (long + growth, short + growth), angle))
        cv2.fillPoly(covered, [grown.round().astype(np.int32)], 1)
    return float(covered.mean())


class FeatureFunction:
    """Looks at clips."""

    def __init__(self, uri: str, *, config: FeatureConfig, decode: DecodeConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.reader = ClipReader(uri, decode)
        on = config.clip.weights is not None
        self.clip = load_open_clip(config.clip, _KEY) if on else None
        self.text = TextDetector(config.text_detector) if config.text_detector is not None else None

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Features of each clip, or why there are none."""
        side = max(_SIDE if self.clip is None else self.clip.size, _TEXT_SIDE if self.text else 0)
        done, seen = [], []
        for row, frames in self.reader.read(rows, lambda row: evenly(row, self.config.num_frames, side)):
            made: Row = {"work_key": row["work_key"], "key": row["key"]}
            done.append(made)
            if isinstance(frames, VideoError):
                made["error"] = frames.reason
                continue
            if self.text is not None:
                made["text_area"] = round(float(np.mean([self.text.area(frame) for frame in frames])), 6)
            if self.clip is not None:
                seen.append((made, self.clip.images(frames)))
        self._embed(seen)
        return done

    @torch.inference_mode()
    def _embed(self, seen: Sequence[tuple[Row, torch.Tensor]]) -> None:
        if self.clip is None or not seen:
            return
        images = torch.cat([images for _, images in seen])
        features = torch.cat(
            [
                self.clip.model.encode_image(batch, normalize=True)[:count]
                for batch, count in fixed_batches(images, self.config.clip.batch_size)
            ]
        )
        for (made, _), own in zip(seen, features.split([len(images) for _, images in seen]), strict=True):
            made["clip"] = pack_features(own)


def fixed_batches(values: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Batches of just ``size`` rows, the last filled up with zeros, and how many rows of each are meant.

    A product over another number of rows may round otherwise.
    """
    for batch in values.split(size):
        fill = batch.new_zeros(size - len(batch), *batch.shape[1:])
        yield torch.cat([batch, fill]), len(batch)


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
        tokens = self.clip.tokenizer([row["text"] for row in rows])
        features = torch.cat(
            [
                self.clip.model.encode_text(batch.to(self.clip.device), normalize=True)[:count]
                for batch, count in fixed_batches(tokens, self.size)
            ]
        )
        return [
            {"work_key": row["work_key"], "clip": pack_features(own[None])}
            for row, own in zip(rows, features, strict=True)
        ]


class Head:
    """A stack of linear layers over CLIP features that gives one number.

    Takes the state dicts of LAION's predictors: one `nn.Linear`, or several in an `nn.Sequential`.

    Args:
        path: A .pth, .pt or .safetensors file.
        key: Config key that named it.
        rectified: Whether there is a ReLU between layers, where their numbers leave room for one.

    Raises:
        UserError: the file is missing or is no such stack.
    """

    def __init__(self, path: str, key: str, *, rectified: bool) -> None:
        self.hash = file_hash(path, key, where=_HEAD_WHERE)
        try:
            if path.endswith(".safetensors"):
                state = load_file(path)
            else:
                state = torch.load(path, weights_only=True, map_location="cpu")
            self._layers = _linear_layers(state, rectified=rectified)
        except Exception as error:
            raise UserError(
                f"{key} {path} is no state dict of linear layers that end in one number: {error}"
            ) from error

    @property
    def width(self) -> int:
        """Features that it takes."""
        return int(self._layers[0].weight.shape[1])

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores [n] of features [n, width]."""
        values = features.astype(np.float64)
        for layer in self._layers:
            if layer.rectify:
                values = np.maximum(values, 0)
            values = values @ layer.weight.T + layer.bias
        return values[:, 0]


@dataclass(frozen=True)
class _Layer:
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    rectify: bool  # its input


def _linear_layers(state: Mapping[str, Any], *, rectified: bool) -> list[_Layer]:
    numbers = {name: [int(number) for number in re.findall(r"\d+", name)] for name in state}
    names = sorted((name for name, value in state.items() if value.ndim == 2), key=numbers.__getitem__)
    used = {*names, *(name.removesuffix("weight") + "bias" for name in names)}
    if odd := sorted(state.keys() - used):
        raise ValueError(f"{odd[0]} belongs to no linear layer")
    layers: list[_Layer] = []
    last: list[int] | None = None
    for name in names:
        weight, bias = state[name].double().numpy(), state.get(name.removesuffix("weight") + "bias")
        gap = last is not None and bool(last) and numbers[name][-1] - last[-1] > 1
        offset = bias.double().numpy() if bias is not None else np.zeros(len(weight))
        layers.append(_Layer(weight, offset, rectified and gap))
        last = numbers[name]
    shapes = [layer.weight.shape for layer in layers]
    if not layers or shapes[-1][0] != 1 or any(after[1] != before[0] for before, after in pairwise(shapes)):
        raise ValueError(f"layers of shapes {shapes}")
    return layers


class FeatureScores:
    """From stored features to scores: heads over frames, and likeness to captions.

    Raises:
        UserError: a head's file is missing or of another kind.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        heads = (("aesthetic", config.aesthetic_head, False), ("nsfw", config.nsfw_head, True))
        self.heads = {
            name: Head(path, f"features.{name}_head", rectified=rectified)
            for name, path, rectified in heads
            if path is not None
        }

    def of_clip(self, row: Row) -> dict[str, float]:
        """Scores of a clip by its frames: aesthetic is their mean, nsfw their highest.

        Raises:
            UserError: the features have another width than a head wants.
        """
        scores = {"text_area": row["text_area"]} if row["text_area"] is not None else {}
        for name, head in self.heads.items():
            values = head(self._frames(row, name, head))
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

    def _frames(self, row: Row, name: str, head: Head) -> NDArray[np.float32]:
        self._check_width(name, head, len(row["clip"]) // 2 // self.config.num_frames)
        return unpack_features(row["clip"], head.width)

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


def features_stage(config: FeatureConfig, decode: DecodeConfig, resources: StageResources) -> Stage:
    """The stage that looks at clips.

    Raises:
        UserError: a model's file is not there.
    """
    settings: dict[str, Any] = {"version": 1, "num_frames": config.num_frames}
    if config.clip.weights is not None:
        settings["clip"] = open_clip_hash(config.clip, _KEY)
        settings["batch_size"] = config.clip.batch_size
    if config.text_detector is not None:
        settings["text"] = file_hash(config.text_detector, "features.text_detector", where=_TEXT_WHERE)
    threads = max(1, int(resources.num_cpus))
    return Stage(
        name="features",
        settings=settings,
        schema=FEATURES,
        function=partial(FeatureFunction, config=config, decode=decode, threads=threads),
        rows_per_part=64,
        resources=resources,
    )


def texts_stage(config: OpenClipConfig, resources: StageResources) -> Stage:
    """The stage that reads captions.

    Raises:
        UserError: the model's file is not there.
    """
    threads = max(1, int(resources.num_cpus))
    return Stage(
        name="texts",
        settings={"version": 1, "clip": open_clip_hash(config, _KEY), "batch_size": config.batch_size},
        schema=TEXT_FEATURES,
        function=partial(TextFunction, config=config, threads=threads),
        rows_per_part=4096,
        resources=resources,
    )
