"""The stage that captions clips through an OpenAI-compatible vision endpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.config import config_hash
from pipelines.data.captions.captioner import CAPTIONED, Captioner, clean_captions
from pipelines.data.captions.endpoint import CaptionEndpoint, CaptionRequest
from pipelines.data.config import CurateConfig
from pipelines.data.reasons import Failure
from pipelines.data.settings import DecodeConfig, EndpointConfig
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.run import Check
from pipelines.data.video.frames import ClipReader, Wanted, evenly
from pipelines.data.video.reader import VideoError

_QUALITY = 90  # of the JPEG files sent, 0..100
# What decides a caption; where the model is served and how fast it may be asked does not.
STAGE = "captions-endpoint"
_DECISIVE = ("model", "prompt", "num_frames", "max_side", "max_tokens", "temperature")

# Why a clip has no caption, as a ledger tells it, and whether it may do better another time.
_FAILURES = {
    "caption_refused": ("the endpoint does not take this clip", False),
    "caption_truncated": ("longer than captions.endpoint.max_tokens", False),
    "caption_malformed": ("no answer was such JSON as was asked for", True),
    "caption_mismatch": ("every answer was to another request", True),
    "caption_unanswered": ("others were answered, this was not", True),
}


class EndpointFunction:
    """Sends frames of clips and takes captions; several requests are under way while the next clips are decoded."""

    def __init__(self, uri: str, *, config: EndpointConfig, captioner: str, decode: DecodeConfig) -> None:
        self.config = config
        self.captioner = captioner
        self.reader = ClipReader(uri, decode)
        self.endpoint = CaptionEndpoint(config, config.read_api_key())

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Captions of each clip, or why there are none.

        Raises:
            EndpointConfigError: the endpoint refuses everything, as the model or key is wrong.
            EndpointDownError: it has answered nothing for as long as the config is patient.
        """
        results: dict[str, Row] = {
            row["work_key"]: {"work_key": row["work_key"], "key": row["key"], "captions": []} for row in rows
        }
        for answer in self.endpoint.run(self._requests(rows, results)):
            result = results[answer.key]
            result |= {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
            if answer.failure:
                detail, transient = _FAILURES[answer.failure]
                result["error"] = str(Failure(answer.failure, detail, transient=transient))
            else:
                result["captions"] = clean_captions([answer.caption], self.captioner)
        return list(results.values())

    def _requests(self, rows: Sequence[Row], results: dict[str, Row]) -> Iterator[CaptionRequest]:
        for row, frames in self.reader.read(rows, self._wanted):
            if isinstance(frames, VideoError):
                results[row["work_key"]]["error"] = frames.reason
            else:
                yield CaptionRequest(row["work_key"], tuple(_jpeg(frame) for frame in frames))

    def _wanted(self, row: Row) -> Wanted:
        shape = evenly(row, self.config.num_frames, self.config.max_side)
        scale = self.config.max_side / max(shape.width, shape.height)
        return replace(shape, width=max(8, round(shape.width * scale)), height=max(8, round(shape.height * scale)))


def _jpeg(frame: NDArray[np.uint8]) -> bytes:
    _, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return data.tobytes()


def endpoint_stage(curate: CurateConfig) -> Stage:
    """The stage, in one process: its requests overlap, and its limits hold for all of them."""
    config, resources = curate.captions.endpoint, curate.resources.of("captions")
    values = asdict(config)
    settings: dict[str, Any] = {"version": 1, "captioner": "endpoint", **{name: values[name] for name in _DECISIVE}}
    captioner = f"{config.model}@{config_hash(settings)[:8]}"
    return Stage(
        name=STAGE,
        settings=settings,
        schema=CAPTIONED,
        function=partial(EndpointFunction, config=config, captioner=captioner, decode=curate.decode),
        rows_per_part=max(64, 8 * config.concurrency),
        resources=replace(resources, min_workers=1, max_workers=1),
    )


def check_endpoint(config: EndpointConfig) -> None:
    """See that the endpoint is there, before any work.

    Raises:
        UserError: it is not, refuses the key, or does not offer the model.
    """
    CaptionEndpoint(config, config.read_api_key()).check()


def _checks(curate: CurateConfig) -> Sequence[Check]:
    return (Check(STAGE, partial(check_endpoint, curate.captions.endpoint)),)


ENDPOINT = Captioner(name="endpoint", stage_name=STAGE, stage=endpoint_stage, checks=_checks)
