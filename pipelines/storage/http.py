"""Whether a web server answers, before anything waits for it: what reads from it later would do so for minutes."""

from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from pipelines.errors import UserError

_PATIENCE_SECONDS = 5.0  # for a connection, and for the first bytes of an answer


def check_server(uri: str) -> None:
    """See to it, within seconds, that the server of an http:// or https:// address answers; others pass unseen.

    Raises:
        UserError: if it does not; the message says what to do. Whatever it answers is left to who reads from it.
    """
    if not uri.lower().startswith(("http://", "https://")):
        return
    try:
        with build_opener(ProxyHandler({})).open(Request(uri, method="HEAD"), timeout=_PATIENCE_SECONDS):
            return
    except HTTPError:
        return
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        told = "no answer" if isinstance(reason, TimeoutError) else getattr(reason, "strerror", None) or reason
        raise UserError(
            f"{uri} cannot be used: {told}; check the address, and that its server is up and can be reached from here"
        ) from error
