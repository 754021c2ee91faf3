"""Fills templates: text is escaped, pictures and videos are embedded, a name that is not given is an error."""

import base64
import functools
from pathlib import Path

import jinja2

from pipelines.errors import UserError


def write_page(path: Path, template: str, **values: object) -> None:
    """Write (or replace) an HTML file: a template of this folder that shows these values."""
    path.write_text(render_page(template, **values), encoding="utf-8")


def render_page(template: str, **values: object) -> str:
    """A template of this folder that shows these values."""
    return _environment().get_template(template).render(values)


def check_writable(path: Path) -> None:
    """Make a page's folder and an empty file, so that a ``UserError`` comes before work is done for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror}); name another file") from error


def shorten(text: str, length: int) -> str:
    """A text without its middle, if it is longer than so many characters."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def data_uri(content: bytes | Path, media_type: str) -> str:
    """The URI that holds a file's content itself."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.pages", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shorten": shorten, "data_uri": data_uri}
    return environment
