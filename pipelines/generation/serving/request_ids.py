"""The id by which a request is found again: the client's own where a log can hold it, else one of ours.

Ray Serve's proxy puts whatever id a client sends into the answer, and answers 500 where this or another header of its
own is no UTF-8, before our application sees the request. So the proxy is handed a middleware that runs first. Nothing
heavy is imported here: the proxy does so in a process of its own.
"""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
# Where Ray Serve's proxies look for middlewares, as they start.
PROXY_VARIABLES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.before_proxy"}
_OF_SERVE = {b"serve_multiplexed_model_id", b"x_session_id"}  # which choose replicas, for applications that let them
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def settle_id(scope: Scope) -> str:
    """The id of a request, which is the only one in its headers afterwards."""
    given = Headers(scope=scope).getlist(REQUEST_ID_HEADER)
    if len(given) == 1 and _GOOD_ID.fullmatch(given[0]):
        return given[0]
    name = secrets.token_hex(8)
    MutableHeaders(scope=scope)[REQUEST_ID_HEADER] = name
    return name


class BeforeProxy:
    """ASGI middleware: every request has one id that is fit for the log, and no header that is for Serve itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 (the class says it)
        if scope["type"] == "http":
            headers = scope["headers"]
            scope["headers"] = [(name, value) for name, value in headers if name.replace(b"-", b"_") not in _OF_SERVE]
            settle_id(scope)
        await self._app(scope, receive, send)


def before_proxy() -> list[Middleware]:
    """What Ray Serve's proxy runs before it looks at a request itself."""
    return [Middleware(BeforeProxy)]
