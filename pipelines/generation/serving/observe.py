"""What whoever runs a service sees of it: a log of JSON lines, each with a request id, and metrics for Prometheus."""

import contextvars
import json
import logging
import time
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumos.compression import VideoSize
from pipelines.generation.request import VideoRequest
from pipelines.generation.serving.request_ids import REQUEST_ID_HEADER, settle_id

_LOG_BYTES, _LOG_FILES = 20_000_000, 3
OTHER = "other"  # as a label
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800)

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
access_log = logging.getLogger("pipelines.generation.serving.access")


class Metrics:
    """Counts of one API process; its name is a label, so that those of several stand beside each other.

    Labels tell the sizes and lengths of ``sizes`` and of images; all others are "other", as clients could ask for any
    number of them, each a series that is kept and scraped for ever.
    """

    def __init__(self, process: str, sizes: Iterable[VideoSize] = ()) -> None:
        self.registry = CollectorRegistry()
        self._process = process
        known = list(sizes)
        self._sizes = {f"{size.width}x{size.height}" for size in known}
        self._lengths = {"1", *(str(size.num_frames) for size in known)}
        names = ("process",)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, names, registry=self.registry).labels(process)

        self.open_jobs = gauge("lumos_jobs_open", "Jobs of this process that wait or run.")
        self.direct = gauge("lumos_direct_requests", "Direct requests that wait or run.")
        self._answers = Counter(
            "lumos_http_answers",
            "Answers by path and status.",
            (*names, "method", "path", "status"),
            registry=self.registry,
        )
        self._jobs = Counter("lumos_jobs", "Jobs by how they ended.", (*names, "model", "end"), registry=self.registry)
        labels = (*names, "model", "size", "frames")
        self._seconds = Histogram(
            "lumos_video_seconds", "From asking a model to the video.", labels, buckets=_SECONDS, registry=self.registry
        )
        self._queued = Histogram(
            "lumos_queue_seconds",
            "From asking a model to the begin of its batch.",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "lumos_batch_size",
            "Requests drawn together, as each of them saw it.",
            (*names, "model"),
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=self.registry,
        )
        self._tokens = Counter(
            "lumos_tokens", "Visual tokens of finished videos; its rate is tokens/s.", (*names, "model"),
            registry=self.registry,
        )  # fmt: skip

    def count_answer(self, method: str, path: str, status: int) -> None:
        """An answer, by the pattern of its path."""
        method = method if method in _METHODS else OTHER  # a client could make up any number
        self._answers.labels(self._process, method, path, str(status)).inc()

    def count_job(self, model: str, end: str) -> None:
        """A job that came to its end."""
        self._jobs.labels(self._process, model, end).inc()

    def batch_began(self, model: str, request: VideoRequest, batch_size: int, waited_s: float) -> None:
        """A request came to be drawn."""
        self._batch.labels(self._process, model).observe(batch_size)
        self._queued.labels(self._process, model, *self._size(request)).observe(waited_s)

    def video_done(self, model: str, request: VideoRequest, seconds: float) -> None:
        """A request has its video."""
        t, h, w = request.size.latent_shape
        self._seconds.labels(self._process, model, *self._size(request)).observe(seconds)
        self._tokens.labels(self._process, model).inc(t * h * w)

    def _size(self, request: VideoRequest) -> tuple[str, str]:
        size, frames = f"{request.size.width}x{request.size.height}", str(request.size.num_frames)
        return size if size in self._sizes else OTHER, frames if frames in self._lengths else OTHER

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self.registry)


def merged(texts: Iterable[bytes]) -> bytes:
    """The counts of several processes as one text: Prometheus wants all lines of a metric together."""
    lines: dict[str, list[str]] = {}  # by the line of help that begins a metric
    for text in texts:
        for line in filter(None, text.decode().split("\n")):
            if line.startswith("# HELP "):
                metric = lines.setdefault(line, [])
            if not line.startswith("#") or line not in metric[:2]:  # its help and type, once
                metric.append(line)
    return "".join(f"{line}\n" for metric in lines.values() for line in metric).encode()


class Observer:
    """ASGI middleware: a request id in and out, an access log line and a count for each answer.

    ``tells_id``: whether answers get the id here, and not from what stands before, as Ray Serve's proxy.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, tells_id: bool = True) -> None:
        self._app, self._metrics, self._tells_id = app, metrics, tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 (the class says it)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER)
        name = given if given and not self._tells_id else settle_id(scope)  # what the answer will say
        token, begin, status = request_id.set(name), time.monotonic(), 499  # 499: the client left

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._tells_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = name
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)  # not the path: a client could make up any number
            self._metrics.count_answer(scope["method"], route, status)
            client = scope.get("client")
            fields = {
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round(1000 * (time.monotonic() - begin), 1),
                "client": client[0] if client else None,
                "owner": scope.get("state", {}).get("owner") or None,
            }
            access_log.info("%s %s %d", scope["method"], fields["path"], status, extra={"fields": fields})
            request_id.reset(token)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name.rpartition(".")[2],
            "message": record.getMessage(),
        }
        if (name := request_id.get()) is not None:
            line["request_id"] = name
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to(folder: str, process: str) -> logging.Handler:
    """Write what this room logs to ``FOLDER/PROCESS.jsonl``; old lines make way."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{process}.jsonl"
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("pipelines.generation")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler
