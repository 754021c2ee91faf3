"""The command: a service until interrupted."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType

from pipelines.cluster import connect, is_joined
from pipelines.errors import UserError
from pipelines.generation.config import ServeConfig
from pipelines.generation.model import ModelCard, RequestEncoder, read_card
from pipelines.generation.serving.application import check_port, http_application

TOKEN_VARIABLE = "LUMOS_SERVE_TOKEN"


def serve(config: ServeConfig) -> None:
    """Serve the model over HTTP until SIGINT (Ctrl-C) or SIGTERM.

    Raises:
        UserError: if the model cannot be used, the port is taken, or strangers could connect without a token.
        JobError: if the model does not start.
    """
    token = (config.token or os.environ.get(TOKEN_VARIABLE) or "").strip() or None
    if token is not None and not token.isascii():
        raise UserError(f"token: holds characters that no HTTP header can; set another {TOKEN_VARIABLE}")
    if token is None and not config.is_loopback:
        raise UserError(
            f"host: {config.host} can be reached from other machines, which needs a token: set {TOKEN_VARIABLE} (or "
            "the key token), or use host 127.0.0.1"
        )
    if not is_joined():
        check_port(config.host, config.port)
    card = read_card(config)
    _check_defaults(config, card)
    service = http_application(card, replace(config, token=token))
    with connect(), _ended_by_signal(), service as url:
        _announce(url, card, needs_token=token is not None)
        threading.Event().wait()


def _check_defaults(config: ServeConfig, card: ModelCard) -> None:
    """Find defaults that cannot be met before clients do."""
    if card.sampling.num_steps > config.max_steps:
        raise UserError(
            f"max_steps: {config.max_steps} is less than the {card.sampling.num_steps} steps that requests take by "
            "default: raise it, or set sampling.num_steps (null is what the model recommends)"
        )
    complete = all(value is not None for value in asdict(config.video).values())
    if not complete and card.default_size is None:
        return  # every request must then name its size
    try:
        RequestEncoder(card).size(config.video)
    except ValueError as error:
        raise UserError(f"video: {error}") from error


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block, at once and in order."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)  # one is enough: leave the clean-up alone
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.write("\nstopping\n")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _announce(url: str, card: ModelCard, *, needs_token: bool) -> None:
    header = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if needs_token else ""
    body = '{"prompt": "a red square moves left", "seed": 7}'
    sys.stdout.write(
        f"serving {card.name} at {url} (documentation: {url}/docs); Ctrl-C ends it. Try:\n"
        f"  curl {url}/v1/videos{header} -H 'Content-Type: application/json' -d '{body}' -o video.mp4\n"
    )
    sys.stdout.flush()
