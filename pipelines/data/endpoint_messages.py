"""What is said to a vision chat endpoint, and how its answers are read.

A request carries an id and an answer must repeat it, so that an answer which a proxy hands to the wrong request is
recognised as such.
"""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pipelines.data.endpoint_settings import EndpointConfig

# Words in the complaints of endpoints that refuse a parameter. The second is what they want in place of max_tokens.
NEGOTIABLE = ("response_format", "max_completion_tokens")

_RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "caption",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"id": {"type": "string"}, "caption": {"type": "string"}},
            "required": ["id", "caption"],
            "additionalProperties": False,
        },
    },
}
_ID = re.compile(r'"id"\s*:\s*"([^"]*)"')


class TryError(Exception):
    """One try that brought no caption.

    Attributes:
        code: Class of the failure, one word.
        detail: For people.
        final: Whether another try would bring the same.
        silent: Whether the endpoint gave no answer, which says nothing of the clip.
        wait: Seconds that the endpoint asks to be left alone.
    """

    def __init__(self, code: str, detail: str, *, final: bool = False, silent: bool = False, wait: float = 0.0) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.final = final
        self.silent = silent
        self.wait = wait


def request_id(key: str) -> str:
    """10 hex digits that name a clip to the endpoint: short, because a model has to copy them."""
    return hashlib.sha256(key.encode()).hexdigest()[:10]


def chat_body(config: EndpointConfig, id: str, images: Sequence[bytes], complaints: Collection[str]) -> dict[str, Any]:
    """The body of a chat request.

    Args:
        config: Model, prompt and bounds.
        id: What the answer must repeat.
        images: JPEG files, in order of time.
        complaints: Those of ``NEGOTIABLE`` that the endpoint has come up with.
    """
    text = (
        f"{config.prompt}\n\nThe pictures are {len(images)} frames of one clip, in order of time. Answer with one JSON "
        f'object and nothing else: {{"id": "{id}", "caption": "<your description>"}}. Copy the id exactly.'
    )
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for image in images:
        data = base64.b64encode(image).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    body: dict[str, Any] = {"model": config.model, "messages": [{"role": "user", "content": content}]}
    body["max_completion_tokens" if "max_completion_tokens" in complaints else "max_tokens"] = config.max_tokens
    if config.temperature is not None:
        body["temperature"] = config.temperature
    if "response_format" not in complaints:
        body["response_format"] = _RESPONSE_FORMAT
    return body


def tokens_used(body: Any) -> tuple[int, int]:
    """(input tokens, output tokens) that an answer reports; 0 where it does not."""
    usage = body.get("usage") if isinstance(body, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    given, made = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
    return given, made


def read_caption(body: Any, id: str) -> str:
    """The caption in an answer, on one line.

    Raises:
        TryError: there is none, or it is for another id.
    """
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content") or "", message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TryError("caption_malformed", f"not a chat completion: {str(body)[:200]}") from None
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    content = str(content)
    if finish == "length":
        _check_id((_ID.findall(content) or [id])[0], id)
        raise TryError("caption_truncated", "the answer was cut short; raise captions.endpoint.max_tokens", final=True)
    if refusal or finish == "content_filter":
        raise TryError("caption_refused", str(refusal or "content filter")[:200], final=True)
    return _parse(content, id)


def _parse(content: str, id: str) -> str:
    try:  # the object alone: models like to put fences or remarks around it
        answer = json.loads(content[content.find("{") : content.rfind("}") + 1], strict=False)
        found, caption = answer["id"], answer["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TryError("caption_malformed", f"not the JSON asked for: {content[:200]!r}") from None
    _check_id(found, id)
    text = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not text:
        raise TryError("caption_malformed", "an empty caption")
    return text.encode(errors="replace").decode()  # escaped surrogates have no UTF-8


def _check_id(found: Any, id: str) -> None:
    if str(found).strip().lower() != id:
        raise TryError("caption_mismatch", f"an answer with the id {str(found)[:40]!r} to a request with the id {id!r}")
