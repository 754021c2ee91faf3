"""Captions from any OpenAI-compatible vision chat endpoint, over a network and a server that may fail in any way."""

import asyncio
import base64
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exception, wait_random_exponential

from pipelines.config import config_hash
from pipelines.data.captions.captioner import CAPTIONED, Captioner, clean_captions
from pipelines.data.config import CurateConfig
from pipelines.data.reasons import Failure
from pipelines.data.settings import EndpointConfig
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.run import Check
from pipelines.data.video.looks import decode_jpeg, encode_jpeg, looks_settings, read_looks
from pipelines.data.video.reader import fit_picture
from pipelines.errors import JobError, UserError

STAGE = "captions-endpoint"
_QUALITY = 90  # of JPEG files that are made smaller to be sent, 0..100
# What decides a caption; where the model is served and how fast it may be asked does not.
_DECISIVE = ("model", "prompt", "num_frames", "max_side", "max_tokens", "temperature")
_BACKOFF = wait_random_exponential(multiplier=0.5, max=30)  # seconds, with full jitter
_CONNECT_SECONDS = 30.0
_PROBE_SECONDS = 5.0  # without any answer, before a request that was answered once is sent ahead of others
_REFUSED_AT_FIRST = 8  # clips refused before any is captioned: then it is not the clips
# Parameters that endpoints refuse by name: then the first is left out, the second replaces max_tokens.
_NEGOTIABLE = ("response_format", "max_completion_tokens")
_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "caption": {"type": "string"}},
    "required": ["id", "caption"],
    "additionalProperties": False,
}
_RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "caption", "strict": True, "schema": _SCHEMA}}
# Why a clip has no caption, as a ledger tells it, and whether it may do better another time.
_FAILURES = {
    "caption_refused": ("the endpoint does not take this clip", False),
    "caption_truncated": ("longer than captions.endpoint.max_tokens", False),
    "caption_malformed": ("no answer was such JSON as was asked for", True),
    "caption_mismatch": ("every answer was to another request", True),
    "caption_unanswered": ("others were answered, this was not", True),
}


class EndpointDownError(JobError):
    """An endpoint that answers nothing. Another run may do better."""


class EndpointConfigError(UserError):
    """An endpoint that will not answer until the configuration or the key is changed."""


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to caption."""

    key: str
    images: tuple[bytes, ...]  # JPEG files in order of time

    @property
    def id(self) -> str:
        """What the answer has to repeat, so that one which a proxy hands to the wrong request is recognised."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:10]  # short, because a model has to copy it


@dataclass
class CaptionAnswer:
    """What came of a request: a caption on one line, or one word that says why there is none."""

    key: str
    caption: str = ""
    failure: str = ""  # a key of ``_FAILURES``
    input_tokens: int = 0  # of all tries, as the endpoint counts them
    output_tokens: int = 0


class _FailureError(Exception):
    """No caption, for a reason of ``_FAILURES``; another try would bring the same."""


class _TryAgainError(_FailureError):
    """No caption this time."""

    def __init__(self, failure: str, *, wait: float = 0.0, in_silence: bool = False) -> None:
        super().__init__(failure)
        self.wait = wait  # seconds that the endpoint asks for
        self.in_silence = in_silence  # the endpoint answered nobody of late, which says nothing of the clip


class CaptionEndpoint:
    """A client of one endpoint. Not for use by several threads at once."""

    def __init__(self, config: EndpointConfig, api_key: str | None) -> None:
        assert config.url is not None  # as CaptionConfig has checked
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise EndpointConfigError(f"the key in {config.api_key_env} holds characters that no key has; set it anew")
        self.config = config
        self.url = config.url.rstrip("/")
        self._api_key = api_key
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._refused_parameters: frozenset[str] = frozenset()
        self._refused_at_first = 0
        self._proven: CaptionRequest | None = None  # the first that was answered
        self._next_start = 0.0  # by the monotonic clock
        self._last_answer = 0.0
        self._silent_since: float | None = None  # when the first request since the last answer started, if it failed

    def check(self) -> None:
        """See that the endpoint is there, takes the key and offers the model; costs nothing.

        Raises:
            EndpointConfigError: nothing answers at the address, the key is refused, or the model not offered.
        """
        seconds = min(self.config.timeout_seconds, _CONNECT_SECONDS)
        try:
            response = httpx.get(f"{self.url}/models", headers=self._headers, timeout=seconds)
        except httpx.RequestError as error:
            raise EndpointConfigError(
                f"no endpoint answers at {self.url} ({self._excerpt(repr(error))}); start it, or correct "
                "captions.endpoint.url"
            ) from error
        if response.status_code in (401, 403):
            raise self._config_error(response)
        try:
            offered = [str(model["id"]) for model in response.json()["data"]] if response.is_success else []
        except (ValueError, KeyError, TypeError):
            return  # not every endpoint has a list
        if offered and self.config.model not in offered:
            raise EndpointConfigError(
                f"the endpoint {self.url} offers no model {self.config.model!r} but {', '.join(offered[:5])}"
                f"{' and others' if len(offered) > 5 else ''}; correct captions.endpoint.model"
            )

    def run(self, requests: Iterable[CaptionRequest]) -> list[CaptionAnswer]:
        """Caption clips; the answers are in the order of the requests.

        Requests are taken in another thread, one whenever fewer than ``concurrency`` are under way.

        Raises:
            EndpointDownError: nothing has been answered for ``patience_seconds``.
            EndpointConfigError: the endpoint refuses the address, the model, the key, or every clip.
        """
        try:
            return asyncio.run(self._run(iter(requests)))
        except BaseExceptionGroup as group:  # the first error ends all other requests
            raise group.exceptions[0] from None

    async def _run(self, requests: Iterator[CaptionRequest]) -> list[CaptionAnswer]:
        self._last_answer, self._silent_since = time.monotonic(), None
        slots = asyncio.Semaphore(self.config.concurrency)
        tasks: list[asyncio.Task[CaptionAnswer]] = []
        client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # a whole answer has a limit of its own
            limits=httpx.Limits(max_connections=self.config.concurrency),
        )
        async with client, asyncio.TaskGroup() as group:
            while True:
                await slots.acquire()
                request = await asyncio.to_thread(next, requests, None)
                if request is None:
                    break
                tasks.append(group.create_task(self._caption(client, request)))
                tasks[-1].add_done_callback(lambda _: slots.release())
        return [task.result() for task in tasks]

    async def _caption(self, client: httpx.AsyncClient, request: CaptionRequest) -> CaptionAnswer:
        """Ask until there is an answer, or a reason why there will be none."""
        answer = CaptionAnswer(request.key)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=lambda state: state.attempt_number >= self.config.max_tries and not _in_silence(state),
            wait=_BACKOFF + wait_exception(lambda error: getattr(error, "wait", 0.0)),
            reraise=True,
        )
        try:
            answer.caption = await retrying(self._ask, client, request, answer)
        except _FailureError as error:
            answer.failure = str(error)
        return answer

    async def _ask(self, client: httpx.AsyncClient, request: CaptionRequest, answer: CaptionAnswer) -> str:
        """The caption that one try brings; its tokens are added to ``answer``."""
        silent_seconds = self.config.patience_seconds - self._patience_left()
        if self._proven and silent_seconds > _PROBE_SECONDS:  # is it the endpoint, or the clips that are asked for?
            _add_tokens(answer, await self._post(client, self._proven))
        while True:
            known = self._refused_parameters
            response = await self._post(client, request)
            refused = {name for name in _NEGOTIABLE if response.is_client_error and name in response.text}
            if refused <= known:
                break
            self._refused_parameters |= refused
        if not response.is_success:
            self._refused_at_first += self._proven is None
            if self._refused_at_first >= _REFUSED_AT_FIRST:
                raise self._config_error(response)
            raise _FailureError("caption_refused")
        _add_tokens(answer, response)
        try:
            body = response.json()
        except (ValueError, RecursionError):
            raise _TryAgainError("caption_malformed") from None
        caption = _read_caption(body, request.id)
        self._proven = self._proven or request
        return caption

    async def _post(self, client: httpx.AsyncClient, request: CaptionRequest) -> httpx.Response:
        """Send a request when its turn has come; returns an answer, or a refusal of this very request."""
        while (delay := self._next_start - time.monotonic()) > 0:
            await asyncio.sleep(delay)  # and look again: another may have started, or been told to wait
        started = time.monotonic()
        self._next_start = started + 60 / (self.config.requests_per_minute or math.inf)
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                response = await client.post(
                    f"{self.url}/chat/completions",
                    json=_chat_body(self.config, request, self._refused_parameters),
                    headers={"X-Request-Id": request.id},
                )
        except TimeoutError:
            raise self._unanswered(f"no answer within {self.config.timeout_seconds:g} s", started) from None
        except httpx.RequestError as error:
            raise self._unanswered(repr(error), started) from error
        if response.status_code in (408, 425, 429) or response.is_server_error:
            header = response.headers.get("Retry-After", "")
            problem = f"HTTP {response.status_code}{header and f', Retry-After {header}'}: {response.text}"
            raise self._unanswered(problem, started, _retry_after(header))
        self._last_answer, self._silent_since = time.monotonic(), None
        if response.is_success or response.status_code in (400, 413, 415, 422):
            return response
        raise self._config_error(response)

    def _unanswered(self, problem: str, started: float, wait: float = 0.0) -> _TryAgainError:
        """Note a try without an answer; all requests wait as long as the endpoint asks one of them to."""
        in_silence = self._silent_since is not None
        self._silent_since = self._silent_since or max(started, self._last_answer)
        if not self._patience_left():
            raise EndpointDownError(
                f"the endpoint {self.url} has answered nothing for {time.monotonic() - self._silent_since:.0f} s "
                f"(captions.endpoint.patience_seconds is {self.config.patience_seconds:g}); the last failure was: "
                f"{self._excerpt(problem)}. Nothing of what is done is lost: when the endpoint is back, give the same "
                "command again to continue"
            )
        wait = min(wait, self._patience_left())
        self._next_start = max(self._next_start, time.monotonic() + wait)
        return _TryAgainError("caption_unanswered", wait=wait, in_silence=in_silence)

    def _patience_left(self) -> float:
        """Seconds that the endpoint may still answer nothing."""
        now = time.monotonic()
        return max(0.0, self.config.patience_seconds - (now - (self._silent_since or now)))

    def _config_error(self, response: httpx.Response) -> EndpointConfigError:
        """What to do about an answer that every request will get."""
        location = response.headers.get("Location")
        said = self._excerpt(f"a redirect to {location}" if location else response.text)
        key = f"{self.config.api_key_env} ({'set' if self._api_key else 'unset: no key was sent'})"
        return EndpointConfigError(
            f"the endpoint {self.url} (model {self.config.model!r}) answered HTTP {response.status_code}: {said}; "
            f"check captions.endpoint.url, captions.endpoint.model, or the environment variable {key}"
        )

    def _excerpt(self, text: str) -> str:
        """The begin of what an endpoint said, on one line, without the key and whatever has no UTF-8."""
        text = text.replace(self._api_key, "***") if self._api_key else text
        return " ".join(text.split())[:300].encode(errors="replace").decode()


def _in_silence(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    return isinstance(error, _TryAgainError) and error.in_silence


def _add_tokens(answer: CaptionAnswer, response: httpx.Response) -> None:
    with suppress(LookupError, TypeError, ValueError, RecursionError):  # not every endpoint counts
        usage = response.json()["usage"]
        answer.input_tokens += int(usage["prompt_tokens"])
        answer.output_tokens += int(usage["completion_tokens"])


def _retry_after(header: str) -> float:
    """Seconds that a Retry-After header (seconds or an HTTP date) asks for; 0 where it says nothing sensible."""
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def _chat_body(config: EndpointConfig, request: CaptionRequest, refused: frozenset[str]) -> dict[str, Any]:
    text = (
        f"{config.prompt}\n\nThe pictures are {len(request.images)} frames of one clip, in order of time. Answer with "
        f'one JSON object and nothing else: {{"id": "{request.id}", "caption": "<your description>"}}. Copy the id '
        "exactly."
    )
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in request.images]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": text}, *pictures]}],
        "max_completion_tokens" if "max_completion_tokens" in refused else "max_tokens": config.max_tokens,
    }
    if config.temperature is not None:
        body["temperature"] = config.temperature
    if "response_format" not in refused:
        body["response_format"] = _RESPONSE_FORMAT
    return body


def _read_caption(body: Any, id: str) -> str:
    """The caption in an answer, on one line."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        if finish == "length":
            raise _FailureError("caption_truncated")
        if message.get("refusal") or finish == "content_filter":
            raise _FailureError("caption_refused")
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        # The object alone: models like to put fences or remarks around it.
        found = json.loads(content[content.find("{") : content.rfind("}") + 1], strict=False)
        found_id, caption = str(found["id"]).strip().lower(), " ".join(found["caption"].split())
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        raise _TryAgainError("caption_malformed") from None
    if found_id != id:
        raise _TryAgainError("caption_mismatch")
    if not caption:
        raise _TryAgainError("caption_malformed")
    return caption.encode(errors="replace").decode()  # escaped surrogates have no UTF-8


class EndpointFunction:
    """Sends frames of clips and takes captions; several requests are under way while the next clips are read."""

    def __init__(self, uri: str, *, config: EndpointConfig, captioner: str) -> None:
        del uri  # nothing is recorded beside the table
        self.config = config
        self.captioner = captioner
        self.endpoint = CaptionEndpoint(config, config.read_api_key())

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Captions of each clip, or why there are none; raises what ``CaptionEndpoint.run`` does."""
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
                images = (_no_larger(image, self.config.max_side) for image in looks.evenly(self.config.num_frames))
                yield CaptionRequest(row["work_key"], tuple(images))


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
    settings: dict[str, Any] = {"version": 2, "looks": looks_settings(curate.looks), "captioner": "endpoint"}
    settings |= {name: getattr(config, name) for name in _DECISIVE}
    captioner = f"{config.model}@{config_hash(settings)[:8]}"
    return Stage(
        name=STAGE,
        settings=settings,
        schema=CAPTIONED,
        function=partial(EndpointFunction, config=config, captioner=captioner),
        rows_per_part=max(64, 8 * config.concurrency),
        resources=replace(resources, min_workers=1, max_workers=1),
    )


def _checks(curate: CurateConfig) -> Sequence[Check]:
    config = curate.captions.endpoint
    return (Check(STAGE, lambda: CaptionEndpoint(config, config.read_api_key()).check()),)


ENDPOINT = Captioner(name="endpoint", stage_name=STAGE, stage=endpoint_stage, checks=_checks)
