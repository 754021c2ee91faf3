"""Bodies of requests and answers: those of OpenAI's video interface, and our own fields besides."""

import json
from collections import Counter
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from starlette.datastructures import FormData, UploadFile

from lumos.config import ShortcutConfig
from pipelines.generation.config import MAX_SEED

BodyT = TypeVar("BodyT", bound=BaseModel)

MAX_PROMPT = 10_000  # characters
_FILES = {"input_reference", "video"}  # fields that may be files
_OBJECTS = {*_FILES, "shortcuts"}  # fields that may be objects: JSON in a form
MAX_VIDEOS = 8  # of one request
_MAX_COMMAS = MAX_PROMPT + 1000  # of what is in JSON: no more values than that are looked at


class BadRequestError(Exception):
    """A request that cannot be met; the message says why, and the field is one that the client wrote."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class ImageReference(BaseModel):
    """A picture or clip, given as text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: str = Field(description="A `data:` URL; http(s) is refused.")


_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Shortcuts(ShortcutConfig):
    """Ways to draw a video in less time that change it; what is left out is off. `{}` is the full sampler."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    guidance_interval: tuple[_Share, _Share] = (0.0, 1.0)
    guidance_cache_from: Annotated[float, Field(gt=0, le=1)] = 1.0
    context_refresh: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    frame_steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], Field(max_length=1000)] = ()


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, examples=["a red square moves left on a blue background"])
    model: str | None = Field(None, max_length=200, description="One of GET /v1/models; the first if left out.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Equal seeds give equal videos; random if left out.")
    num_inference_steps: int | None = Field(None, ge=1, description="Sampling steps per latent frame.")
    steps: int | None = Field(None, ge=1, description="Alias of num_inference_steps.")
    guidance_scale: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False, description="1 is no guidance.")
    history_ratio: float | None = Field(None, ge=0, le=1, description="Share of earlier frames hidden from later ones.")
    temperature: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="Of the noise in the choice of what is drawn anew."
    )
    draw_temperature: float | None = Field(
        None, ge=0.01, le=100, allow_inf_nan=False, description="Of the draw of a code; below 1 likely ones come more."
    )
    shortcuts: Shortcuts | None = Field(
        None, description="Faster, approximate sampling: `{}` is the full sampler.", examples=[{"order": "halton"}]
    )
    user: str | None = Field(None, max_length=200, description="Taken and not used.")

    @model_validator(mode="after")
    def _one_of_each(self) -> "_Body":
        for names in (("num_inference_steps", "steps"), ("num_frames", "frames", "seconds")):
            given = [name for name in names if getattr(self, name, None) is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} are both given; they say the same: leave one out")
        return self

    def name_of(self, *names: str) -> str:
        """The name among several that the client used."""
        return next((name for name in names if getattr(self, name, None) is not None), names[0])


class VideoBody(_Body):
    """A video to make. What is left out is the service's default (see GET /v1/models)."""

    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT in pixels.", examples=["448x256"])
    seconds: Annotated[str, Field(max_length=20)] | float | None = Field(
        None, description="Length; whole seconds are met to the nearest 1 + 4k frames, others must be such a number."
    )
    num_frames: int | None = Field(None, ge=1, le=100_000, description="1 + 4k, those given included; 1 is an image.")
    frames: int | None = Field(None, ge=1, le=100_000, description="Alias of num_frames.")
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False, description="Frames per second to draw for.")
    motion: int | None = Field(None, ge=0, le=9, description="How much is to move, if the model was trained with it.")
    input_reference: ImageReference | str | None = Field(
        None, description="The first frame or frames: an image or a clip, as an uploaded file or a `data:` URL."
    )
    num_given: int | None = Field(
        None, ge=1, le=100_000, description="Last frames of a clip that are gone on from, 1 + 4k; as fits if left out."
    )


class JobBody(VideoBody):
    """A video to make as a job, or several."""

    n: int | None = Field(None, ge=1, le=MAX_VIDEOS, description="Videos to make, with successive seeds.")


class VideoReference(BaseModel):
    """A finished video of this service."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(max_length=100)


class ExtensionBody(_Body):
    """A finished video to go on with; what is left out is as it was made.

    What is drawn begins with as many of its last frames as are left of the longest videos that the model was trained
    on (`limits` of GET /v1/models) once those to add are taken off: at least one. Adding less at a time lets it see
    more of what was before; the answer's `num_given` says how much.
    """

    video: VideoReference | None = Field(None, description="Of this service; or an uploaded file.")
    seconds: Annotated[str, Field(max_length=20)] | float | None = Field(
        None, description="Length of what is added, met to the nearest 4k frames; half of a whole video if left out."
    )
    num_frames: int | None = Field(None, ge=1, le=100_000, description="Frames that are added, 4k.")
    frames: int | None = Field(None, ge=1, le=100_000, description="Alias of num_frames.")


class ImageBody(_Body):
    """Images to make, at once."""

    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT in pixels.", examples=["448x256"])
    n: int | None = Field(None, ge=1, le=MAX_VIDEOS, description="Images to make, with successive seeds.")
    response_format: Literal["b64_json"] | None = Field(None, description="Images come in the answer.")


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Video(BaseModel):
    """A job that makes a video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    seed: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    history_ratio: float
    temperature: float
    draw_temperature: float
    motion: int | None = Field(description="How much was to move; null where nothing was said.")
    shortcuts: dict[str, Any] | None = Field(description="Faster, approximate sampling; null is the full sampler.")
    num_given: int = Field(description="Frames given to begin with: of a picture, a clip or a finished video.")
    latent_frames: int = Field(description="Of the whole video; progress counts them.")
    config_hash: str = Field(description="Names everything that decides the video but prompt and seed.")
    ids: list[str] = Field(description="All jobs of the request that made this one, by seed.")


class VideoList(BaseModel):
    """Jobs, by time."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A job that is gone, its work stopped and its files removed."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Image(BaseModel):
    """An image."""

    b64_json: str
    seed: int


class Images(BaseModel):
    """Images, by seed."""

    created: int
    output_format: Literal["png"] = "png"
    size: str
    data: list[Image]


class Model(BaseModel):
    """A model, with the defaults and limits of requests."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parameters: int
    format: str
    defaults: dict[str, Any]
    limits: dict[str, Any]
    identity: dict[str, Any]


class ModelList(BaseModel):
    """What is served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str
    param: str | None = None
    field: str | None = Field(None, description="As param, which it was called before.")


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


_MEMBERS = {  # of fields that are objects
    "shortcuts": [field.name for field in fields(Shortcuts)],
    "video": list(VideoReference.model_fields),
    "input_reference": list(ImageReference.model_fields),
}
_UNIONS = ("seconds", "input_reference")  # fields of several types


def parse_json(kind: type[BodyT], data: bytes) -> BodyT:
    """A body from JSON.

    Raises:
        BadRequestError: if it is none; the message names the field.
    """
    _check_commas(data.count(b","), "the body", kind)
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(kind, error) from error
    _load_json(data.decode())
    return body


def _load_json(text: str, field: str | None = None) -> Any:
    """What JSON holds; of a name that comes twice nobody knows which value is meant, and parsers differ."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise BadRequestError(f"{twice:.80} is given twice", field or twice)
        return found

    return json.loads(text, object_pairs_hook=once)


def _check_commas(count: int, holder: str, kind: type[BaseModel], field: str | None = None) -> None:
    """Look at the number of values in JSON: a million unknown fields are a million errors, half a minute of them."""
    if count > _MAX_COMMAS:
        known = ", ".join(kind.model_fields)
        raise BadRequestError(f"{holder} holds more than {_MAX_COMMAS} commas; known: {known}", field)


def parse_form(kind: type[BodyT], form: FormData) -> tuple[BodyT, UploadFile | None]:
    """A body from multipart fields, and the file among them; ``video[id]`` is the id of ``video``.

    A field that is an object may be JSON too.

    Raises:
        BadRequestError: if it is none; the message names the field.
    """
    values: dict[str, Any] = {}
    file: UploadFile | None = None
    for name, value in form.multi_items():
        outer, bracket, inner = name.partition("[")
        if bracket and not isinstance(value, UploadFile):
            _put_inner(values, outer, inner.removesuffix("]"), value)
            continue
        if outer in values:
            raise BadRequestError(f"{outer} is given twice", outer)
        if isinstance(value, UploadFile):
            if name not in _FILES or name not in kind.model_fields:
                raise BadRequestError(f"{name} cannot be a file", name)
            file = value
        elif outer in _OBJECTS and value.lstrip().startswith("{"):
            _check_commas(value.count(","), outer, kind, outer)
            try:
                values[outer] = _load_json(value, outer)
            except (ValueError, RecursionError) as error:
                raise BadRequestError(f"{outer} is not valid JSON", outer) from error
        else:
            values[outer] = value
    if file is not None and (twice := values.keys() & _FILES):
        raise BadRequestError(f"{twice.pop()} is given twice")
    try:
        return kind.model_validate(values, strict=False), file
    except ValidationError as error:
        raise _explain(kind, error) from error


def _put_inner(values: dict[str, Any], outer: str, inner: str, value: str) -> None:
    """Note a field ``outer[inner]`` of a form; an ``outer[inner][]`` is an item of a list, and may come again."""
    holder = values.setdefault(outer, {})
    name = inner.removesuffix("][")
    if isinstance(holder, dict) and name != inner and isinstance(items := holder.setdefault(name, []), list):
        items.append(value)
    elif isinstance(holder, dict) and name not in holder:
        holder[name] = value
    else:
        raise BadRequestError(f"{outer} is given twice", outer)


def _explain(kind: type[BaseModel], error: ValidationError) -> BadRequestError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    name = path[0] if path else None
    if name in _UNIONS:  # the second part is pydantic's name of a member
        del path[1:2]
    if first["type"] == "json_invalid":
        return BadRequestError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        where, known = ("", kind.model_fields) if len(path) == 1 else (f" of {path[0]}", _MEMBERS[path[0]])
        return BadRequestError(f"unknown field {path[-1]!r:.80}{where}; known: {', '.join(known)}", name)
    if first["type"] == "value_error":
        return BadRequestError(": ".join([*path[:1], str(first["ctx"]["error"])]), name)
    if name is None:
        return BadRequestError(f"the body must be a JSON object: {first['msg']}")
    if name in _MEMBERS and first["type"] in ("dataclass_type", "model_type", "model_attributes_type"):
        of = ", ".join(_MEMBERS[name])
        return BadRequestError(f"{name}: it must be an object of {of}, got {first.get('input')!r:.80}", name)
    return BadRequestError(f"{'.'.join(path)}: {first['msg']}, got {first.get('input')!r:.80}", name)
