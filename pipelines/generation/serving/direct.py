"""Paths that answer with what they make: a video, images; and what is served."""

import asyncio
import base64
import time
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.exceptions import HTTPException

from pipelines.generation.config import MAX_SEED
from pipelines.generation.request import Refusal, file_name
from pipelines.generation.serving.answers import ERRORS, body_schema, described
from pipelines.generation.serving.requests import describe_model, to_request
from pipelines.generation.serving.schema import BadRequestError, Image, ImageBody, Images, Model, ModelList, VideoBody
from pipelines.generation.serving.service import Service, body_of, refuse
from pipelines.media import MEDIA_TYPES


def add_direct_routes(v1: APIRouter, service: Service) -> None:
    """Add /v1/videos/sync and /v1/images/generations."""
    media = {MEDIA_TYPES[service.config.format]: {"schema": {"type": "string", "format": "binary"}}}

    @v1.post(
        "/videos/sync",
        response_class=Response,
        responses=described(None, "The file.", "file", media) | ERRORS["work"] | ERRORS["body"] | ERRORS["direct"],
        openapi_extra=body_schema(VideoBody, service.config.max_upload_mb << 20),
    )
    async def make_video(request: Request) -> Response:
        """Make a video and answer with the file; leave, and the work stops."""
        body, file = await body_of(VideoBody, request)
        served = service.model(body.model)
        asked = await service.with_given(to_request(body, served, service.config), body, file)
        answer = await service.draw(served, asked)
        if isinstance(answer, Refusal):
            return refuse(answer)
        headers = {
            "X-Lumos-Seed": str(asked.seed),
            "X-Lumos-Config-Hash": asked.config_hash(served.card.identity),
            "Content-Disposition": f'inline; filename="{file_name(asked.prompt, asked.seed, asked.format)}"',
        }
        if (why := served.card.untrained(asked.size)) is not None:
            headers["X-Lumos-Warning"] = why
        return Response(answer, media_type=MEDIA_TYPES[asked.format], headers=headers)

    @v1.post(
        "/images/generations",
        response_model=Images,
        responses=ERRORS["work"] | ERRORS["body"] | ERRORS["direct"],
        openapi_extra=body_schema(ImageBody, 1 << 20),
    )
    async def make_images(request: Request) -> Images | Response:
        """Make images and answer with them, PNG as base64."""
        body, _ = await body_of(ImageBody, request)
        served = service.model(body.model)
        first = to_request(body, served, service.config)
        if (count := body.n or 1) > 1 and first.seed > MAX_SEED + 1 - count:
            raise BadRequestError(f"seed {first.seed} leaves no room for {count} successive seeds", "seed")
        asked = [replace(first, seed=first.seed + place) for place in range(count)]
        drawing = [asyncio.create_task(service.draw(served, one)) for one in asked]
        try:
            for done in asyncio.as_completed(drawing):
                if isinstance(answer := await done, Refusal):
                    return refuse(answer)
        finally:  # of all or none: where one is refused, the others are stopped
            for task in drawing:
                task.cancel()
        images = [
            Image(b64_json=base64.b64encode(data).decode(), seed=one.seed)
            for one, task in zip(asked, drawing, strict=True)
            if isinstance(data := task.result(), bytes)
        ]
        return Images(created=int(time.time()), size=f"{first.size.width}x{first.size.height}", data=images)


def add_model_routes(v1: APIRouter, service: Service) -> None:
    """Add /v1/models."""

    @v1.get("/models", response_model=ModelList, responses=ERRORS["read"])
    async def list_models() -> ModelList:
        """The models that are served, with the defaults and limits of requests."""
        return ModelList(data=[describe_model(served, service.config) for served in service.models.values()])

    @v1.get("/models/{model}", response_model=Model, responses=ERRORS["read"] | ERRORS["missing"])
    async def retrieve_model(model: Annotated[str, Path(max_length=200)]) -> Model:
        """One of them."""
        if model not in service.models:
            raise HTTPException(404, f"there is no model {model!r:.100}")
        return describe_model(service.models[model], service.config)
