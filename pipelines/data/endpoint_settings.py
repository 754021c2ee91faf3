"""Settings of the endpoint that captions. Apart from the client, which needs httpx: configs are read without it."""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from lumos.config import require

PROMPT = (
    "Describe this video clip in one or two detailed sentences: who or what it shows, what happens, the setting, and "
    "how the camera is placed and moves. State what is visible; do not begin with words such as 'The video shows'."
)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible vision chat endpoint that captions clips, and what may be asked of it."""

    url: str | None = None  # up to the version, such as http://127.0.0.1:8000/v1; none: no captions are asked for
    model: str = ""  # as the endpoint names it
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; unset: no key is sent
    prompt: str = PROMPT
    num_frames: int = 4  # of each clip that the model sees
    max_side: int = 512  # px of the longer side of a frame
    max_tokens: int = 256  # of an answer, the JSON around the caption included
    temperature: float | None = 0.0  # none: the endpoint's own, for models that take no other
    concurrency: int = 8  # requests in flight
    requests_per_minute: float | None = None  # started, retries included; none: no limit
    timeout_seconds: float = 120.0  # for one whole answer
    max_tries: int = 6  # that fail while the endpoint answers others, before a clip goes without a caption
    patience_seconds: float = 600.0  # for an endpoint that answers nothing at all, before the run stops
    input_price: float = 0.0  # per million tokens, in any currency
    output_price: float = 0.0

    def __post_init__(self) -> None:
        """Check the address and ranges."""
        if self.url is not None:
            _check_url(self.url)
            require(bool(self.model), "model is empty; name one that the endpoint offers (GET url/models lists them)")
        require(
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is not None,
            "api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, never the key itself",
        )
        require(bool(self.prompt.strip()), "prompt is empty; say what a caption should tell")
        require(1 <= self.num_frames <= 64, f"num_frames must be in 1..64, got {self.num_frames}")
        require(64 <= self.max_side <= 4096, f"max_side must be in 64..4096 px, got {self.max_side}")
        require(self.max_tokens >= 32, f"max_tokens must be at least 32, got {self.max_tokens}")
        heat = self.temperature
        require(heat is None or 0 <= heat <= 2, f"temperature must be in [0, 2], or none, got {heat}")
        require(1 <= self.concurrency <= 1024, f"concurrency must be in 1..1024, got {self.concurrency}")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, f"requests_per_minute must be positive, or none for no limit, got {rate}")
        require(self.timeout_seconds > 0, f"timeout_seconds must be positive, got {self.timeout_seconds}")
        require(self.max_tries >= 1, f"max_tries must be at least 1, got {self.max_tries}")
        require(self.patience_seconds > 0, f"patience_seconds must be positive, got {self.patience_seconds}")
        require(self.input_price >= 0, f"input_price must not be negative, got {self.input_price}")
        require(self.output_price >= 0, f"output_price must not be negative, got {self.output_price}")

    def read_api_key(self) -> str | None:
        """The key from the environment, None where it is unset or empty."""
        return os.environ.get(self.api_key_env, "").strip() or None


def _check_url(url: str) -> None:
    """Refuse what is no endpoint, and what holds a secret: configs are published with the data."""
    parts = urlsplit(url)
    require(
        not (parts.username or parts.password or parts.query or parts.fragment),
        "url must hold no user, password or query, as configs are published; the key belongs in the environment "
        "variable that api_key_env names",
    )
    require(
        parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.split() == [url],
        f"url must be like http://127.0.0.1:8000/v1, got {url!r}",
    )
    require(
        not url.rstrip("/").endswith("/completions"),
        f"url must end before /chat/completions, as in http://127.0.0.1:8000/v1, got {url!r}",
    )
