"""What stands before every request: tokens, rates, lengths of bodies and the time in which they must arrive."""

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MAX_TEXT = 1 << 20  # bytes of a body without files
_BAD_TOKEN = "a valid bearer token is needed: Authorization: Bearer TOKEN"
_MAX_CLIENTS = 10_000  # whose rates are remembered


class GuardedRoute(APIRoute):
    """Turns away who may not ask, and what is too long or too slow, before FastAPI looks at a request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler behind the checks."""
        handler = super().get_route_handler()
        longest = (self.openapi_extra or {}).get("x-max-body", 0)  # bytes

        async def guarded(request: Request) -> Response:
            state, headers = request.app.state, request.headers
            owner = state.tokens.owner(headers.get("authorization", ""))
            request.state.owner = owner
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > max(longest, MAX_TEXT) or "transfer-encoding" in headers:
                raise HTTPException(
                    413,
                    f"the body must be at most {max(longest, MAX_TEXT)} bytes, and Content-Length must tell its length",
                )
            if longest:
                client = request.client.host if request.client else ""
                state.rates.count(owner or client)
                await state.bodies.read(request, int(length))
            return await handler(request)

        return guarded


class Tokens:
    """Who may ask: everyone where there are no tokens, else whoever shows one of them."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    def owner(self, authorization: str) -> str:
        """Who asks, by a digest of the token; a 401 if the header shows none that is known."""
        if not self._tokens:
            return ""
        kind, _, given = authorization.partition(" ")
        shown = given.strip().encode()
        found = [token for token in self._tokens if hmac.compare_digest(shown, token)]  # each in constant time
        if kind.lower() != "bearer" or not found:
            raise HTTPException(401, _BAD_TOKEN, {"WWW-Authenticate": "Bearer"})
        return hashlib.sha256(b"owner:" + found[0]).hexdigest()[:16]


class Rates:
    """How often each client may ask for work: so many times a minute, all at once if it likes."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was so

    def count(self, client: str) -> None:
        """Count a request; a 429 if it is one too many."""
        if self._per_minute is None:
            return
        now = time.monotonic()
        left, since = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        self._buckets[client] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            wait = (1 - left) * 60 / self._per_minute
            raise HTTPException(
                429,
                f"more than {self._per_minute} requests a minute came from this client",
                {"Retry-After": str(int(wait) + 1)},
            )


class BodyReader:
    """Reads bodies within a deadline, and a bounded number and length at a time.

    When one more comes, the one that has been arriving for longest gives way. So clients that open many requests and
    never finish them keep out each other, and not those that send a whole body at once.
    """

    def __init__(self, timeout_s: float, max_open: int, max_bytes: int) -> None:
        self._timeout_s, self._max_open, self._max_bytes = timeout_s, max_open, max_bytes
        self._open: dict[asyncio.Timeout, int] = {}  # bytes of the bodies that are arriving, oldest first

    async def read(self, request: Request, length: int = 0) -> None:
        """Wait for the body, which the request then keeps."""
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                while self._open and (
                    len(self._open) >= self._max_open or sum(self._open.values()) + length > self._max_bytes
                ):
                    oldest = next(iter(self._open))
                    if oldest.expired():  # one whose time is just up ends by itself, with 408
                        break
                    del self._open[oldest]
                    oldest.reschedule(0.0)
                self._open[deadline] = length
                await request.body()
        except TimeoutError as error:
            if deadline in self._open:
                raise HTTPException(
                    408, f"the body did not arrive within {self._timeout_s:g} s", {"Connection": "close"}
                ) from error
            headers = {"Connection": "close", "Retry-After": "1"}
            raise HTTPException(
                503, f"more than {self._max_open} requests are sending their bodies", headers
            ) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client left before its body had arrived") from error
        finally:
            self._open.pop(deadline, None)
