"""Captions from any OpenAI-compatible vision chat endpoint, over a network and a server that may fail in any way.

Requests run in an event loop of one background thread, not in a thread each: a read that blocks cannot be interrupted,
so a run that is abandoned would hang until its requests time out.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import httpx

from pipelines.data.endpoint_loop import loop_in_thread
from pipelines.data.endpoint_messages import NEGOTIABLE, TryError, chat_body, read_caption, request_id, tokens_used
from pipelines.data.endpoint_pace import Pacer, Silence, backoff, retry_after
from pipelines.data.endpoint_settings import EndpointConfig
from pipelines.errors import JobError, UserError

_AHEAD = 4  # requests taken from the caller per request in flight, so that one which is tried again stalls no others
_CONNECT_SECONDS = 30.0
_REFUSED_AT_FIRST = 8  # clips refused before any is captioned: then it is not the clips


class EndpointDownError(JobError):
    """An endpoint that answers nothing. Another run may do better."""


class EndpointConfigError(UserError):
    """An endpoint that will not answer until the configuration or the key is changed."""


@dataclass(frozen=True)
class CaptionRequest:
    """A clip to caption.

    Attributes:
        key: Names the clip.
        images: JPEG files, at least one, in order of time.
    """

    key: str
    images: tuple[bytes, ...]

    def __post_init__(self) -> None:
        """Check that there is something to see: a model would describe nothing at length."""
        if not self.images:
            raise ValueError(f"caption request {self.key!r} has no images; give at least one frame")


@dataclass(frozen=True)
class CaptionReply:
    """A caption, on one line, and the tokens of the answer that brought it (0 where the endpoint does not tell)."""

    key: str
    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class CaptionRefusal:
    """A clip without a caption.

    Attributes:
        key: Names the clip.
        code: ``caption_refused`` (the endpoint rejects this clip), ``caption_truncated``, ``caption_malformed``,
            ``caption_mismatch`` (answers to other requests) or ``caption_unanswered`` (it answers others, not this).
        detail: For people; may differ from run to run.
        transient: Whether the same clip may do better another time.
    """

    key: str
    code: str
    detail: str
    transient: bool


@dataclass
class Usage:
    """What has been asked of an endpoint, failed tries included."""

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class CaptionEndpoint:
    """A client of one endpoint. Not for use by several threads at once.

    Attributes:
        usage: Counts over all runs.
    """

    def __init__(self, config: EndpointConfig, api_key: str | None) -> None:
        if config.url is None:
            raise ValueError("captions.endpoint.url is none; name an endpoint, such as http://127.0.0.1:8000/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise EndpointConfigError(f"the key in {config.api_key_env} holds characters that no key has; set it anew")
        self.config = config
        self.usage = Usage()
        self.url = config.url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.pacer = Pacer(config.requests_per_minute)
        self.complaints: set[str] = set()
        self.proven: CaptionRequest | None = None  # it was answered once, so that it tells a dead endpoint from a live
        self.refused_at_first = 0
        self._api_key = api_key

    @property
    def cost(self) -> float:
        """What the tokens of ``usage`` cost, in the currency of the prices."""
        usage, config = self.usage, self.config
        return (usage.input_tokens * config.input_price + usage.output_tokens * config.output_price) / 1e6

    def check(self) -> None:
        """See that the endpoint is there, takes the key and offers the model; costs nothing.

        Raises:
            EndpointDownError: nothing answers at the address.
            EndpointConfigError: the key is refused, or the model not offered.
        """
        seconds = min(self.config.timeout_seconds, _CONNECT_SECONDS)
        try:
            response = httpx.get(f"{self.url}/models", headers=self.headers, timeout=seconds)
        except httpx.RequestError as error:
            raise EndpointDownError(
                f"no endpoint answers at {self.url} ({self.excerpt(_told(error))}); start it, or correct "
                "captions.endpoint.url"
            ) from error
        if response.status_code in (401, 403):
            raise self.config_error(response)
        try:
            offered = [str(model["id"]) for model in response.json()["data"]] if response.is_success else []
        except (ValueError, KeyError, TypeError):
            return  # not every endpoint has a list
        if offered and self.config.model not in offered:
            raise EndpointConfigError(
                f"the endpoint {self.url} offers no model {self.config.model!r} but {', '.join(offered[:5])}"
                f"{' and others' if len(offered) > 5 else ''}; correct captions.endpoint.model"
            )

    def run(self, requests: Iterable[CaptionRequest]) -> Iterator[CaptionReply | CaptionRefusal]:
        """Caption clips; answers come in the order of the requests.

        Requests are taken as answers leave, at most ``4 * concurrency`` ahead of them. Closing the iterator drops what
        is in flight.

        Raises:
            EndpointDownError: nothing has been answered for ``patience_seconds``.
            EndpointConfigError: the endpoint refuses the address, the model, the key, or every clip.
        """
        client = httpx.AsyncClient(
            headers=self.headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),  # the whole has a limit of its own
            limits=httpx.Limits(max_connections=self.config.concurrency),
        )
        session = _Session(self, client)
        source = iter(requests)
        ahead: deque[Future[CaptionReply | CaptionRefusal]] = deque()
        with loop_in_thread(client.aclose) as loop:
            while True:
                while len(ahead) < _AHEAD * self.config.concurrency and not session.stopped.done():
                    request = next(source, None)
                    if request is None:
                        break
                    ahead.append(asyncio.run_coroutine_threadsafe(session.caption(request), loop))
                if not ahead:
                    return
                first = ahead.popleft()
                wait({first, session.stopped}, return_when=FIRST_COMPLETED)
                yield first.result() if first.done() else session.stopped.result()

    def config_error(self, response: httpx.Response) -> EndpointConfigError:
        """What to do about an answer that every request will get."""
        location = response.headers.get("Location")
        told = f"a redirect to {location}" if location else response.text
        key = self.config.api_key_env
        return EndpointConfigError(
            f"the endpoint {self.url} (model {self.config.model!r}) answered HTTP {response.status_code}: "
            f"{self.excerpt(told)}; check captions.endpoint.url, captions.endpoint.model, or the environment variable "
            f"{key} ({'set' if self._api_key else 'unset: no key was sent'})"
        )

    def excerpt(self, text: str) -> str:
        """The begin of what an endpoint told, on one line, without the key and whatever has no UTF-8."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return " ".join(text.split())[:300].encode(errors="replace").decode()


class _Session:
    """The requests of one run, all in one event loop.

    A try that gets no answer counts against its clip only if others were answered meanwhile. Where nobody is, all wait
    at one gate while one request probes whether the endpoint is back. It is a request that was answered before, where
    there is one, so that a clip which the endpoint cannot bear is not taken for an endpoint that is down.
    """

    def __init__(self, endpoint: CaptionEndpoint, client: httpx.AsyncClient) -> None:
        self.endpoint = endpoint
        self.config = endpoint.config
        self.client = client
        self.stopped: Future[CaptionReply | CaptionRefusal] = Future()  # ends, with an error, when the run has to stop
        self.silence = Silence(self.config.patience_seconds)
        self.slots = asyncio.Semaphore(self.config.concurrency)
        self.turns = asyncio.Lock()
        self.gate = asyncio.Event()
        self.gate.set()

    async def caption(self, request: CaptionRequest) -> CaptionReply | CaptionRefusal:
        """Ask until there is an answer, or a reason why there will be none."""
        try:
            return await self._caption(request)
        except (EndpointDownError, EndpointConfigError) as error:
            if not self.stopped.done():
                self.stopped.set_exception(error)
            raise

    async def _caption(self, request: CaptionRequest) -> CaptionReply | CaptionRefusal:
        attempts = tries = 0
        failed_at = time.monotonic()
        while True:
            attempts += 1
            try:
                return await self._ask(request)
            except TryError as failure:
                error = failure
            others_answered = self.silence.last_answer > failed_at
            failed_at = time.monotonic()
            if not error.silent or others_answered:
                tries += 1
            elif attempts > 1 and self.gate.is_set():
                was_down = await self._outlast(request)
                tries += not was_down
            if error.final or tries >= self.config.max_tries:
                return CaptionRefusal(
                    request.key, error.code, self.endpoint.excerpt(error.detail), transient=not error.final
                )
            self.endpoint.usage.retries += 1
            if error.silent:  # a wrong answer comes from an endpoint that is well
                await asyncio.sleep(min(max(backoff(attempts), error.wait), self.silence.patience_left))

    async def _outlast(self, request: CaptionRequest) -> bool:
        """Close the gate until the endpoint answers; whether it was down at all."""
        self.gate.clear()
        attempt, pause = 0, 0.0
        try:
            while True:
                attempt += 1
                await asyncio.sleep(min(max(backoff(attempt), pause), self.silence.patience_left))
                try:
                    await self._ask(self.endpoint.proven or request, through_gate=True)
                except TryError as error:
                    if error.silent:
                        pause = error.wait
                        if self.silence.patience_left:
                            continue
                        raise self._down_error() from error
                return attempt > 1
        finally:
            self.gate.set()

    async def _ask(self, request: CaptionRequest, *, through_gate: bool = False) -> CaptionReply:
        """Post a request when it may be."""
        while True:
            if not through_gate:
                await self.gate.wait()
            async with self.slots:
                await self._turn(through_gate)
                if self.stopped.done():
                    self.stopped.result()  # raises what ended the run
                if through_gate or self.gate.is_set():
                    return await self._post(request)

    async def _turn(self, through_gate: bool) -> None:
        async with self.turns:
            if through_gate or self.gate.is_set():  # those that will wait anyway use up no turns
                await self.endpoint.pacer.turn()

    async def _post(self, request: CaptionRequest) -> CaptionReply:
        id = request_id(request.key)
        complaints = frozenset(self.endpoint.complaints)
        started = time.monotonic()
        self.endpoint.usage.requests += 1
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                response = await self.client.post(
                    f"{self.endpoint.url}/chat/completions",
                    json=chat_body(self.config, id, request.images, complaints),
                    headers={"X-Request-Id": id},
                )
        except TimeoutError:
            raise self._no_answer(f"no answer within {self.config.timeout_seconds:g} s", started) from None
        except httpx.RequestError as error:
            raise self._no_answer(_told(error), started) from error
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            pause = retry_after(response.headers.get("Retry-After"))
            raise self._no_answer(f"HTTP {status}: {response.text}", started, pause)
        self.silence.answered()
        if response.is_success:
            return self._read(request, id, response)
        if status not in (400, 413, 415, 422):
            raise self.endpoint.config_error(response)
        fresh = {word for word in NEGOTIABLE if word in response.text} - complaints
        if fresh:
            self.endpoint.complaints |= fresh
            await self._turn(through_gate=True)
            return await self._post(request)
        raise self._refused(response)

    def _read(self, request: CaptionRequest, id: str, response: httpx.Response) -> CaptionReply:
        try:
            body = response.json()
        except (ValueError, RecursionError):
            raise TryError("caption_malformed", f"not JSON: {response.text}") from None
        given, made = tokens_used(body)
        self.endpoint.usage.input_tokens += given
        self.endpoint.usage.output_tokens += made
        reply = CaptionReply(request.key, read_caption(body, id), given, made)
        self.endpoint.proven = self.endpoint.proven or request
        return reply

    def _no_answer(self, told: str, started: float, pause: float = 0.0) -> TryError:
        self.silence.failed(self.endpoint.excerpt(told), started)
        pause = min(pause, self.silence.patience_left)
        self.endpoint.pacer.hold(pause)
        return TryError("caption_unanswered", told, silent=True, wait=pause)

    def _refused(self, response: httpx.Response) -> TryError:
        self.endpoint.refused_at_first += self.endpoint.proven is None
        if self.endpoint.refused_at_first >= _REFUSED_AT_FIRST:
            raise self.endpoint.config_error(response)
        return TryError("caption_refused", f"HTTP {response.status_code}: {response.text}", final=True)

    def _down_error(self) -> EndpointDownError:
        return EndpointDownError(
            f"the endpoint {self.endpoint.url} has answered nothing for {self.silence.seconds:.0f} s "
            f"(captions.endpoint.patience_seconds is {self.config.patience_seconds:g}); the last failure was: "
            f"{self.silence.last_failure}. Nothing of what is done is lost: when the endpoint is back, give the same "
            "command again to continue"
        )


def _told(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
