"""The paths of jobs: to make videos, follow them, fetch them, go on with them and forget them."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pipelines.generation.config import MAX_SEED
from pipelines.generation.request import VideoRequest, file_name
from pipelines.generation.serving import pictures
from pipelines.generation.serving.answers import ERRORS, body_schema, described
from pipelines.generation.serving.content import file_answer
from pipelines.generation.serving.jobs import Job, request_of
from pipelines.generation.serving.requests import extended, num_added, to_request, told_shortcuts
from pipelines.generation.serving.runner import Before, picture_name
from pipelines.generation.serving.schema import (
    BadRequestError,
    DeletedVideo,
    ExtensionBody,
    JobBody,
    Video,
    VideoError,
    VideoList,
)
from pipelines.generation.serving.service import Service, body_of
from pipelines.media import MEDIA_TYPES

_POLL_MS = 500  # what pollers are told to wait, at least
_POLLS_PER_S = 20  # of all jobs of a process: each costs about what a step of a small model does
_WATCH_S = 0.3  # between looks at a job that somebody watches
_KEEP_ALIVE_S = 15.0  # between comments to a watcher where nothing happens
_MAX_PAGE = 100
_MAX_SECONDS = 120.0  # of a video that grew by extensions: each decodes and writes the whole of it

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_EVENTS = (
    "Events `progress` (done, total, picture: JPEG as base64, of each latent frame), and `queued`, `in_progress`, "
    "`completed`, `failed` with the video object, or `deleted`."
)
_RANGE = "Of the video's bytes, such as `bytes=0-1023`. Several, or what is no range, get the whole."
VideoId = Annotated[str, Path(max_length=100, description="Of a video object.")]


class _VideoRoutes:
    """What the paths do."""

    def __init__(self, service: Service) -> None:
        self._service, self._runner, self._store = service, service.runner, service.runner.store

    async def create_video(self, request: Request) -> Response:
        """Begin to make a video, or `n` of them, and answer with the job."""
        body, file = await body_of(JobBody, request)
        served = self._service.model(body.model)
        first = to_request(body, served, self._service.config)
        if (count := body.n or 1) > self._runner.limit:
            raise BadRequestError(f"n is {count}; this service takes at most {self._runner.limit} jobs at once", "n")
        if count > 1 and first.seed > MAX_SEED + 1 - count:
            raise BadRequestError(f"seed {first.seed} leaves no room for {count} successive seeds", "seed")
        first = await self._service.with_given(first, body, file)
        requests = [replace(first, seed=first.seed + place) for place in range(count)]
        jobs = await self._runner.submit(served.name, requests, request.state.owner)
        return self._created(jobs[0], served.card.untrained(first.size))

    async def extend_video(self, request: Request) -> Response:
        """Go on with a finished video, whose last frames begin what is drawn, or with a clip.

        The answer holds the whole of a video of this service, and the last frames of a clip. The more is added at a
        time, the fewer frames it goes on from: together they are as long as what the model was trained on. Adding that
        length less one frame, or more, goes on from the last frame alone.
        """
        body, file = await body_of(ExtensionBody, request)
        before: Before | None = None
        if file is not None:
            served = self._service.model(body.model)
            first, frames = await self._service.of_upload(body, served, file)
        elif body.video is not None:
            job = await self._job(body.video.id, request)
            data = await self._content(job)
            served, first = self._service.model(body.model or job.model), request_of(job)
            _check_whole(body, first, to_video(job).num_frames)
            frames = await asyncio.to_thread(_frames_of, job, data)
            before = Before(job.id, data, len(frames))
        else:
            raise BadRequestError("video: Field required", "video")
        drawn, num_given = extended(body, first, len(frames), served, self._service.config)
        drawn = replace(drawn, given=frames[len(frames) - num_given :])
        jobs = await self._runner.submit(served.name, [drawn], request.state.owner, before)
        return self._created(jobs[0], served.card.untrained(drawn.size))

    async def list_videos(
        self,
        request: Request,
        after: Annotated[str | None, Query(max_length=100, description="The last id of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Jobs of this client, by time."""
        found = await asyncio.to_thread(self._list, request.state.owner, after, limit + 1, order == "desc")
        page = [to_video(job) for job in found[:limit]]
        return VideoList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    def _list(self, owner: str, after: str | None, count: int, newest_first: bool) -> list[Job]:
        ids = sorted(self._store.ids(), reverse=newest_first)
        if after is not None:
            ids = [job_id for job_id in ids if (job_id < after if newest_first else job_id > after)]
        found: list[Job] = []
        for job_id in ids:
            version = self._store.read(job_id)
            if version is not None and version.job.owner == owner and version.job.expires_at >= time.time():
                found.append(version.job)
                if len(found) == count:
                    break
        return found

    async def retrieve_video(self, video_id: VideoId, request: Request) -> Response:
        """How far a job is."""
        return self._answer(await self._job(video_id, request))

    def _created(self, job: Job, warning: str | None) -> JSONResponse:
        answer = self._answer(job)
        if warning is not None:
            answer.headers["X-Lumos-Warning"] = warning
        return answer

    def _answer(self, job: Job) -> JSONResponse:
        poll_ms = max(_POLL_MS, 1000 * self._runner.num_open // _POLLS_PER_S)
        headers = {"openai-poll-after-ms": str(poll_ms)} if job.is_open else None
        return JSONResponse(to_video(job).model_dump(), headers=headers)

    async def delete_video(self, video_id: VideoId, request: Request) -> DeletedVideo:
        """Forget a job and its video; one that is being made is stopped."""
        job = await self._job(video_id, request)
        await self._runner.delete(job.id)
        return DeletedVideo(id=job.id)

    async def download_content(
        self,
        video_id: VideoId,
        request: Request,
        variant: Literal["video", "thumbnail", "spritesheet"] = "video",
        range_: Annotated[str | None, Header(alias="Range", description=_RANGE)] = None,
    ) -> Response:
        """The video of a job that is completed, or a JPEG of its middle frame or of many of its frames."""
        job = await self._job(video_id, request)
        if variant != "video":
            data = await self._content(job)
            draw = pictures.thumbnail if variant == "thumbnail" else pictures.spritesheet
            picture = await asyncio.to_thread(lambda: draw(_frames_of(job, data)))
            return Response(picture, media_type="image/jpeg")
        made = request_of(job)
        headers = {
            "X-Lumos-Seed": str(made.seed),
            "X-Lumos-Config-Hash": job.config_hash,
            "Content-Disposition": f'inline; filename="{file_name(made.prompt, made.seed, made.format)}"',
        }
        try:
            name = _file_of(job)
            return await file_answer(self._store, job.id, name, request, headers, MEDIA_TYPES[made.format])
        except FileNotFoundError as error:
            raise _gone(job) from error

    async def watch_video(self, video_id: VideoId, request: Request) -> Response:
        """Server-sent events of a job, from its beginning to its end."""
        job = await self._job(video_id, request)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(self._events(job), media_type="text/event-stream", headers=headers)

    async def _job(self, video_id: str, request: Request) -> Job:
        """The client's job of an id; a 404 where there is none."""
        version = await asyncio.to_thread(self._store.read, video_id)
        job = version.job if version is not None else None
        if job is None or job.owner != request.state.owner or job.expires_at < time.time():
            raise HTTPException(404, f"there is no video {video_id!r:.60}, or it has expired")
        return job

    async def _content(self, job: Job) -> bytes:
        """The file of a job; a 409 where it is not completed, a 404 where its file is gone."""
        data = await asyncio.to_thread(self._store.read_file, job.id, _file_of(job))
        if data is None:
            raise _gone(job)
        return data

    async def _events(self, job: Job) -> AsyncIterator[str]:
        shown, told, quiet = 0, "", time.monotonic()
        while True:
            for done in range(shown + 1, job.done + 1):
                picture = await asyncio.to_thread(self._store.read_file, job.id, picture_name(done))
                if picture is None and done < job.done:  # frames that were given have none
                    continue
                encoded = base64.b64encode(picture).decode() if picture is not None else None
                yield _event("progress", {"id": job.id, "done": done, "total": job.total, "picture": encoded})
            if not job.is_open:
                yield _event(job.status, to_video(job).model_dump())
                return
            if job.status != told or job.done != shown:
                yield _event(job.status, to_video(job).model_dump())
                quiet = time.monotonic()
            elif time.monotonic() - quiet > _KEEP_ALIVE_S:
                yield ": still there\n\n"
                quiet = time.monotonic()
            shown, told = job.done, job.status
            await asyncio.sleep(_WATCH_S)
            version = await asyncio.to_thread(self._store.read, job.id)
            if version is None:
                yield _event("deleted", {"id": job.id, "object": "video.deleted", "deleted": True})
                return
            job = version.job


def add_video_routes(v1: APIRouter, service: Service) -> None:
    """Add the paths below /v1/videos but for the direct one."""
    routes, upload = _VideoRoutes(service), service.config.max_upload_mb << 20
    read, missing = ERRORS["read"], ERRORS["missing"]
    v1.add_api_route(
        "/videos",
        routes.create_video,
        methods=["POST"],
        response_model=Video,
        responses=described(Video, "The job, or the first of several; poll it, or watch its events.", "job")
        | ERRORS["work"]
        | ERRORS["body"],
        openapi_extra=body_schema(JobBody, upload),
    )
    v1.add_api_route(
        "/videos/extensions",
        routes.extend_video,
        methods=["POST"],
        response_model=Video,
        responses=described(Video, "The job.", "job") | ERRORS["work"] | ERRORS["body"] | missing | ERRORS["conflict"],
        openapi_extra=body_schema(ExtensionBody, upload),
    )
    v1.add_api_route("/videos", routes.list_videos, response_model=VideoList, responses=read | ERRORS["query"])
    v1.add_api_route(
        "/videos/{video_id}",
        routes.retrieve_video,
        response_model=Video,
        responses=described(Video, "The job as it is.", "job") | read | missing,
    )
    v1.add_api_route(
        "/videos/{video_id}",
        routes.delete_video,
        methods=["DELETE"],
        response_model=DeletedVideo,
        responses=read | missing,
    )
    whole = {MEDIA_TYPES[service.config.format]: _BINARY, "image/jpeg": _BINARY}
    part = described(None, "The range that is asked for.", "part", {MEDIA_TYPES[service.config.format]: _BINARY}, 206)
    for method in ("GET", "HEAD"):
        v1.add_api_route(
            "/videos/{video_id}/content",
            routes.download_content,
            methods=[method],
            response_class=Response,
            responses=described(None, "The file.", "stored", whole)
            | (part | ERRORS["range"] if method == "GET" else {})
            | read
            | missing
            | ERRORS["conflict"],
        )
    v1.add_api_route(
        "/videos/{video_id}/events",
        routes.watch_video,
        response_class=StreamingResponse,
        responses=described(None, _EVENTS, "events", {"text/event-stream": {"schema": {"type": "string"}}})
        | read
        | missing,
    )


def _event(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


def _file_of(job: Job) -> str:
    """The name of a job's file; a 409 where it is not completed."""
    if job.status == "failed":
        raise HTTPException(409, f"video {job.id} failed: {(job.error or {}).get('message', '')}")
    if job.is_open or not job.file:
        raise HTTPException(409, f"video {job.id} is {job.status}, not completed", {"Retry-After": "1"})
    return job.file


def _gone(job: Job) -> HTTPException:
    return HTTPException(404, f"the file of video {job.id} is gone: it was deleted, or somebody removed it")


def _frames_of(job: Job, data: bytes) -> np.ndarray:
    """The frames of a job's file; a 404 where it is no longer the video that was written."""
    try:
        frames = pictures.decode_frames(data)
        size = request_of(job).size
        if frames.shape[1:3] != (size.height, size.width):
            raise pictures.DamagedError(f"its frames have another size, {list(frames.shape)}")
    except pictures.DamagedError as error:
        raise HTTPException(
            404, f"the file of video {job.id} is damaged, somebody changed it: delete it and make the video again"
        ) from error
    return frames


def _check_whole(body: ExtensionBody, first: VideoRequest, num_before: int) -> None:
    """Raise a ``BadRequestError`` if a video of so many frames may not grow by what a body asks for."""
    fps = first.size.fps
    seconds = (num_before + num_added(body, fps, first.size.num_frames)) / fps
    if seconds > _MAX_SECONDS:
        raise BadRequestError(
            f"video: with what is asked for it would last {seconds:.4g} s, of {_MAX_SECONDS:g} s at most: ask for less "
            "or upload its end as a clip",
            "video",
        )


def to_video(job: Job) -> Video:
    """A job as a client sees it."""
    made = request_of(job)
    frames = job.num_before + made.size.num_frames
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=100 if job.status == "completed" else min(99, 100 * job.done // job.total),
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=int(job.expires_at),
        size=f"{made.size.width}x{made.size.height}",
        seconds=f"{frames / made.size.fps:.4g}",
        prompt=made.prompt,
        remixed_from_video_id=job.source,
        error=VideoError(**job.error) if job.error else None,
        seed=made.seed,
        num_frames=frames,
        fps=made.size.fps,
        num_inference_steps=made.sampling.num_steps,
        guidance_scale=made.sampling.guidance_scale,
        history_ratio=made.sampling.history_ratio,
        temperature=made.sampling.temperature,
        draw_temperature=made.sampling.draw_temperature,
        motion=made.motion,
        shortcuts=told_shortcuts(made.sampling),
        num_given=job.num_given,
        latent_frames=job.total,
        config_hash=job.config_hash,
        ids=job.ids,
    )
