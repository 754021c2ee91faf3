"""The stage that captions clips through an OpenAI-compatible vision endpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from pipelines.config import config_hash
from pipelines.data.captions.captioner import CAPTIONED, Captioner, clean_captions
from pipelines.data.captions.endpoint import CaptionEndpoint, CaptionRequest
from pipelines.data.config import CurateConfig
from pipelines.data.reasons import Failure
from pipelines.data.settings import EndpointConfig
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.run import Check
from pipelines.data.video.looks import decode_jpeg, encode_jpeg, looks_settings, read_looks
from pipelines.data.video.reader import fit_picture

_QUALITY = 90  # of JPEG files that are made smaller to be sent, 0..100
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
    """Sends frames of clips and takes captions; several requests are under way while the next clips are read."""

    def __init__(self, uri: str, *, config: EndpointConfig, captioner: str) -> None:
        del uri  # nothing is recorded beside the table
        self.config = config
        self.captioner = captioner
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
        for row, looks in read_looks(rows):
            if looks.error:
                results[row["work_key"]]["error"] = looks.error
            else:
                images = looks.evenly(self.config.num_frames)
                yield CaptionRequest(
                    row["work_key"], tuple(_no_larger(image, self.config.max_side) for image in images)
                )


def _no_larger(image: bytes, side: int) -> bytes:
    """A JPEG file whose longer side has that many px at most: as it is, or made smaller."""
    frame = decode_jpeg(image)
    height, width = frame.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    return encode_jpeg(fit_picture(frame, size), _QUALITY)


def endpoint_stage(curate: CurateConfig) -> Stage:
    """The stage, in one process: its requests overlap, and its limits hold for all of them."""
    config, resources = curate.captions.endpoint, curate.resources.of(STAGE)
    values = asdict(config)
    decisive = {name: values[name] for name in _DECISIVE}
    settings: dict[str, Any] = {
        "version": 2,
        "looks": looks_settings(curate.looks),
        "captioner": "endpoint",
        **decisive,
    }
    captioner = f"{config.model}@{config_hash(settings)[:8]}"
    return Stage(
        name=STAGE,
        settings=settings,
        schema=CAPTIONED,
        function=partial(EndpointFunction, config=config, captioner=captioner),
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
