"""What OpenAPI is told beyond what FastAPI sees: bodies in two forms, headers, and every status that is sent."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from pipelines.generation.serving.schema import ErrorBody, ExtensionBody, ImageBody, JobBody, VideoBody

_MEANINGS = {
    400: "The request cannot be met; the message says why, and `param` names the field.",
    401: "The bearer token is missing or wrong.",
    404: "There is no such video, or it has expired, is another client's, or its file is gone or damaged.",
    408: "The body did not arrive in time.",
    409: "The video is not completed.",
    413: "The body is too long, or its length is not told.",
    415: "The body is neither JSON nor multipart/form-data.",
    416: "No byte of the file is in the range; Content-Range tells how many it has.",
    429: "This client asks for more than it may; Retry-After says when to come again.",
    500: "The service failed; its log says more.",
    503: "Too many requests are here, or the model or the store does not answer; Retry-After says when to come again.",
    504: "The video was not done in time.",
}
_HEADERS = {
    "x-request-id": "As the client sent it, if that is 1 to 64 of A-Z a-z 0-9 . _ -, else ours; the log names it.",
    "retry-after": "Seconds.",
    "www-authenticate": "Bearer.",
    "x-lumos-seed": "Of the draws.",
    "x-lumos-config-hash": "Names everything that decides the video but prompt and seed.",
    "x-lumos-warning": "That the model was not trained on such videos, if it was not.",
    "content-disposition": "A name for the file.",
    "accept-ranges": "bytes: ranges of the video can be asked for.",
    "content-range": "Which bytes these are, of how many.",
    "etag": "Names the file, which never changes; for If-Range.",
    "openai-poll-after-ms": "Milliseconds to wait before asking again; not of jobs that are done.",
}
_OF_STATUS = {
    401: ["www-authenticate"],
    429: ["retry-after"],
    503: ["retry-after"],
    409: ["retry-after"],
    416: ["content-range"],
}
_OF_KIND = {
    "file": ["x-lumos-seed", "x-lumos-config-hash", "x-lumos-warning", "content-disposition"],
    "stored": ["x-lumos-seed", "x-lumos-config-hash", "content-disposition", "accept-ranges", "etag"],
    "part": ["x-lumos-seed", "x-lumos-config-hash", "content-disposition", "accept-ranges", "etag", "content-range"],
    "job": ["openai-poll-after-ms", "x-lumos-warning"],
    "events": [],
}

Responses = dict[int | str, dict[str, Any]]


def _headers(names: list[str]) -> dict[str, Any]:
    names = ["x-request-id", *names]
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


def _errors(*statuses: int) -> Responses:
    return {
        status: {
            "model": ErrorBody,
            "description": _MEANINGS[status],
            "headers": _headers(_OF_STATUS.get(status, [])),
        }
        for status in statuses
    }


ERRORS = {
    "read": _errors(401, 413, 500, 503),
    "query": _errors(400),
    "body": _errors(400, 408, 413, 415),
    "work": _errors(401, 429, 500, 503),
    "direct": _errors(504),
    "missing": _errors(400, 404),
    "conflict": _errors(409),
    "range": _errors(416),
}


def described(
    model: type[BaseModel] | None, text: str, kind: str, content: dict[str, Any] | None = None, status: int = 200
) -> Responses:
    """A good answer of a path, with its headers."""
    answer: dict[str, Any] = {"description": text, "headers": _headers(_OF_KIND[kind])}
    if model is not None:
        answer["model"] = model
    if content is not None:
        answer["content"] = content
    return {status: answer}


def body_schema(model: type[BaseModel], max_bytes: int) -> dict[str, Any]:
    """A body in JSON or multipart, and the most bytes that it may have."""
    reference = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    form = model.model_json_schema(ref_template="#/components/schemas/{model}")
    form.pop("$defs", None)
    for name in {"input_reference", "video"} & form["properties"].keys():
        form["properties"][name] = {"type": "string", "format": "binary", "description": "A file."}
    return {
        "x-max-body": max_bytes,
        "requestBody": {
            "required": True,
            "content": {"application/json": reference, "multipart/form-data": {"schema": form}},
        },
    }


def add_schema(app: FastAPI, *, needs_token: bool) -> None:
    """Let /openapi.json tell the truth: no 422, which is never sent, and a token only where one is asked for."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app, needs_token)
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _schema(app: FastAPI, needs_token: bool) -> dict[str, Any]:
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, openapi_version="3.1.0"
    )
    schemas = made["components"]["schemas"]
    for model in (JobBody, VideoBody, ExtensionBody, ImageBody):
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(found.pop("$defs", {}))
        schemas[model.__name__] = found
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if needs_token:
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for name, path in made["paths"].items():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if not needs_token:
                operation["responses"].pop("401", None)
            elif name.startswith("/v1/") or name == "/metrics":
                operation["security"] = [{"token": []}]
    return made
