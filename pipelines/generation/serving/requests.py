"""From what a client wrote to what is drawn, told in its own words where that cannot be; models as clients see them."""

import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from lumos.compression import TEMPORAL_FACTOR, VideoSize, num_latent_frames, parse_size
from lumos.config import SamplingConfig, ShortcutConfig
from lumos.encoder import RequestEncoder
from pipelines.generation.config import SamplingChoice, ServeConfig
from pipelines.generation.model import ModelCard
from pipelines.generation.request import Refusal, VideoRequest
from pipelines.generation.serving.schema import (
    BadRequestError,
    ExtensionBody,
    ImageBody,
    Model,
    VideoBody,
)

Status = Callable[[], Awaitable[dict[str, Any]]]


class Draw(Protocol):
    """Makes the file of a video within some seconds, or says why not; ``on_progress`` as of ``generator.ask``."""

    def __call__(  # noqa: D102 (the class says it)
        self, request: VideoRequest, timeout_s: float | None, *, on_progress: Any = None, pictures: bool = False
    ) -> Awaitable[bytes | Refusal]: ...


@dataclass(frozen=True)
class Served:
    """A model that is served: what is known of it, and how it is asked."""

    name: str
    card: ModelCard
    encoder: RequestEncoder
    draw: Draw
    status: Status  # must answer quickly
    created: int  # when its folder was written, seconds since the epoch


def to_request(body: VideoBody | ImageBody, served: Served, config: ServeConfig) -> VideoRequest:
    """The video that a body asks for; what is left out is as the service and the model have it.

    Raises:
        BadRequestError: if the model or the service cannot do that.
    """
    defaults = config.video
    width, height = defaults.width, defaults.height
    if body.size is not None:
        width, height = _checked("size", lambda: parse_size(body.size or ""))
    fps = getattr(body, "fps", None) or defaults.fps
    size = _checked("size", lambda: served.encoder.size(width=width, height=height, num_frames=1, fps=fps))
    if isinstance(body, ImageBody):
        num_frames = 1
    else:
        usual = defaults.num_frames or getattr(served.card.folder.default_size, "num_frames", None)
        num_frames = _num_frames(body, size.fps, usual)
    size = _checked(
        body.name_of("num_frames", "frames", "seconds"),
        lambda: served.encoder.size(width=width, height=height, num_frames=num_frames, fps=fps),
    )
    name = body.name_of("size", "num_frames", "frames", "seconds")
    _check_caps(name, size, config)
    if config.untrained_sizes == "refuse" and not isinstance(body, ImageBody) and (why := served.card.untrained(size)):
        raise BadRequestError(why, "fps" if served.card.has_trained_shape(size) else name)
    motion = getattr(body, "motion", None)
    request = VideoRequest(
        prompt=body.prompt.strip(),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        size=size,
        sampling=_sampling(body, config).over(served.card.sampling),
        format="png" if isinstance(body, ImageBody) else _format(body, num_frames, config),
        motion=config.motion if motion is None and num_frames > 1 else motion,
    )
    check_fits(request, served, name)
    return request


def check_fits(request: VideoRequest, served: Served, name: str) -> None:
    """Raise a ``BadRequestError`` if prompt and video, which a field of that name sizes, exceed the model's context."""
    try:
        request.encode(served.encoder)
    except ValueError as error:
        text = str(error)
        field = "motion" if text.startswith("motion") else "prompt" if "prompt" in text else name
        raise BadRequestError(text, field) from error


def num_added(body: ExtensionBody, fps: float, usual: int) -> int:
    """Frames that a body asks to add to a video; ``usual`` is the length of a whole one."""
    name = body.name_of("num_frames", "frames", "seconds")
    added = body.num_frames if body.num_frames is not None else body.frames
    if added is None and body.seconds is not None:
        added = round(parse_seconds(body.seconds) * fps / TEMPORAL_FACTOR) * TEMPORAL_FACTOR
    if added is None:
        added = TEMPORAL_FACTOR * max(1, (usual - 1) // (2 * TEMPORAL_FACTOR))
    if added < TEMPORAL_FACTOR or added % TEMPORAL_FACTOR:
        below = max(TEMPORAL_FACTOR, added - added % TEMPORAL_FACTOR)
        raise BadRequestError(
            f"{name}: {added} frames to add are not 4k: use {below} or {below + TEMPORAL_FACTOR}", name
        )
    return added


def extended(
    body: ExtensionBody, first: VideoRequest, num_before: int, served: Served, config: ServeConfig
) -> tuple[VideoRequest, int]:
    """What is drawn to go on with a video of ``num_before`` frames, and how many of them it begins with.

    As many as leave the whole as long as the longest that the model was trained on at this size, where it names that,
    and as fit its context and the service's bounds: at least one. Settings are those of the first video where nothing
    is said.
    """
    added = num_added(body, first.size.fps, first.size.num_frames)
    name = body.name_of("num_frames", "frames", "seconds")
    request = replace(
        first,
        prompt=body.prompt.strip(),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        sampling=_sampling(body, config).over(first.sampling),
        format=_format(body, added + 1, config),
        given=None,
    )
    num_given = max(1, min(num_before, _longest_trained(first.size, served) - added))
    num_given -= (num_given - 1) % TEMPORAL_FACTOR
    while True:
        try:
            whole = asdict(replace(first.size, num_frames=num_given + added))
            request = replace(request, size=_checked(name, partial(served.encoder.size, **whole)))
            _check_caps(name, request.size, config)
            check_fits(request, served, name)
        except BadRequestError as error:
            if num_given == 1:
                if error.field != name:
                    raise
                raise BadRequestError(f"{added} frames to add to one are too many: {error}", name) from error
            num_given -= TEMPORAL_FACTOR
        else:
            break
    if config.untrained_sizes == "refuse" and (why := served.card.untrained(request.size)) is not None:
        raise BadRequestError(why, name)
    return request, num_given


def _longest_trained(size: VideoSize, served: Served) -> int:
    """Frames of the longest videos of a size that a model was trained on; of any, where it was on none of that size."""
    trained = [each for each in trained_sizes(served) if each.num_frames > 1]
    alike = [each for each in trained if (each.width, each.height) == (size.width, size.height)]
    return max((each.num_frames for each in alike or trained), default=size.num_frames)


def _num_frames(body: VideoBody, fps: float, usual: int | None) -> int:
    """Frames asked for, by number or by length."""
    if body.seconds is not None:
        return _frames_of_seconds(parse_seconds(body.seconds), fps)
    asked = body.num_frames if body.num_frames is not None else body.frames
    if asked is None:
        if usual is None:
            raise BadRequestError(
                "num_frames is not given and the model names no length it was trained on", "num_frames"
            )
        return usual
    name = body.name_of("num_frames", "frames")
    try:
        num_latent_frames(asked)
    except ValueError as error:
        raise BadRequestError(str(error).replace("num_frames", name), name) from error
    return asked


def _frames_of_seconds(seconds: float, fps: float) -> int:
    """Frames of a length. Whole seconds are met to the nearest 1 + 4k, which is never quite they."""
    exact = seconds * fps
    below = 1 + int(max(0.0, exact - 1) // TEMPORAL_FACTOR) * TEMPORAL_FACTOR
    nearest = below if exact - below <= below + TEMPORAL_FACTOR - exact else below + TEMPORAL_FACTOR
    if seconds != int(seconds) and abs(exact - nearest) > 0.5:
        lengths = [f"{frames / fps:.4g} ({frames} frames)" for frames in (below, below + TEMPORAL_FACTOR)]
        raise BadRequestError(
            f"seconds: {seconds:g} at {fps:g} fps are {exact:.4g} frames, not 1 + 4k: use {' or '.join(lengths)}",
            "seconds",
        )
    return nearest


def parse_seconds(value: str | float) -> float:
    """A length that a client wrote, as a number or as text."""
    try:
        seconds = float(value)
    except ValueError as error:
        raise BadRequestError(f"seconds: {value!r:.40} is no number", "seconds") from error
    if not 0 < seconds <= 100_000:
        raise BadRequestError(f"seconds: {value!s:.40} is not above 0 and at most 100000", "seconds")
    return seconds


def _sampling(body: VideoBody | ImageBody | ExtensionBody, config: ServeConfig) -> SamplingChoice:
    _check_steps(body, config)
    return SamplingChoice(
        num_steps=body.num_inference_steps if body.num_inference_steps is not None else body.steps,
        guidance_scale=body.guidance_scale,
        history_ratio=body.history_ratio,
        temperature=body.temperature,
        draw_temperature=body.draw_temperature,
        shortcuts=ShortcutConfig(**vars(body.shortcuts)) if body.shortcuts is not None else None,
    )


def _check_steps(body: VideoBody | ImageBody | ExtensionBody, config: ServeConfig) -> None:
    name = body.name_of("num_inference_steps", "steps")
    steps = getattr(body, name)
    if steps is not None and steps > config.max_steps:
        raise BadRequestError(f"{name} is {steps}; this service allows at most {config.max_steps}", name)
    listed = body.shortcuts.frame_steps if body.shortcuts is not None else ()
    if steps is not None and listed:
        raise BadRequestError(f"{name} and shortcuts.frame_steps are both given: leave one out", name)
    most = max(listed, default=0)
    if most > config.max_steps:
        raise BadRequestError(
            f"shortcuts: frame_steps holds {most}; this service allows at most {config.max_steps}", "shortcuts"
        )


def _check_caps(name: str, size: VideoSize, config: ServeConfig) -> None:
    cells = math.prod(size.latent_shape)
    if config.max_cells is not None and cells > config.max_cells:
        raise BadRequestError(
            f"{size} are {cells} latent cells; this service allows at most {config.max_cells}: ask for fewer frames or "
            "a smaller size",
            name,
        )


def _format(body: VideoBody | ExtensionBody, num_frames: int, config: ServeConfig) -> Any:
    if config.format == "png" and num_frames != 1:
        name = body.name_of("num_frames", "frames", "seconds")
        raise BadRequestError(f"{name}: this service writes png, which holds one frame", name)
    return config.format


def _checked(field: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        text = str(error)
        named = "fps" if text.startswith("fps") else "size" if text.startswith(("width", "height", "size")) else field
        if named == field == "seconds":  # which the frames are computed from
            text = f"seconds: {text}"
        elif named == field:
            text = text.replace("num_frames", field)
        raise BadRequestError(text, named) from error


def trained_sizes(served: Served) -> list[VideoSize]:
    """The sizes and lengths that a model was trained on, where its folder names them."""
    info = served.card.folder.info
    return [VideoSize.of_latents(shape, info.fps) for shape in info.shapes] if info.fps is not None else []


def usual_sizes(served: Served, config: ServeConfig) -> list[VideoSize]:
    """Those, and the one that requests get which name none."""
    try:
        return [*trained_sizes(served), served.encoder.size(**asdict(config.video))]
    except ValueError:  # the checkpoint names no size: every request must
        return trained_sizes(served)


def told_shortcuts(sampling: SamplingConfig) -> dict[str, Any] | None:
    """The shortcuts that are on, as a request names them; None for the full sampler."""
    on = asdict(sampling.shortcuts) if sampling.shortcuts is not None else {}
    return {name: value for name, value in on.items() if value != getattr(ShortcutConfig, name)} or None


def describe_model(served: Served, config: ServeConfig) -> Model:
    """A model as a client sees it."""
    folder, sampling = served.card.folder, served.card.sampling
    try:
        size = served.encoder.size(**asdict(config.video))
        defaults: dict[str, Any] = {"size": f"{size.width}x{size.height}", "frames": size.num_frames, "fps": size.fps}
    except ValueError:  # the checkpoint names no size: every request must
        defaults = {}
    defaults |= {
        "steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "history_ratio": sampling.history_ratio,
        "temperature": sampling.temperature,
        "draw_temperature": sampling.draw_temperature,
        "shortcuts": told_shortcuts(sampling),
    }
    limits = {
        "size_multiple_of": folder.vocabulary.grid_unit,
        "frames": "1 + 4k",
        "trained_on": [
            {"size": f"{size.width}x{size.height}", "frames": size.num_frames, "fps": size.fps}
            for size in trained_sizes(served)
        ],
        "max_steps": config.max_steps,
        "max_tokens": folder.config.max_seq_len,
        "max_cells": config.max_cells,
    }
    return Model(
        id=served.name,
        created=served.created,
        owned_by=folder.name,
        parameters=folder.config.num_parameters,
        format=config.format,
        defaults=defaults,
        limits=limits,
        identity=served.card.identity,
    )
