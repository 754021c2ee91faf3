"""The page at /, by which a person uses the service; its files are of this package, and it asks nobody else."""

from importlib import resources

from fastapi import APIRouter, FastAPI, Response

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a newer service has newer files
}
_FILES = {  # path below /page/: package, media type
    "house.css": ("pipelines.pages", "style.css", "text/css"),
    **{name: (__name__, name, "text/css") for name in ("page.css",)},
    **{name: (__name__, name, "text/javascript") for name in ("page.js", "service.js", "repeat.js", "tile.js")},
}


def add_page(app: FastAPI) -> None:
    """Add the page and its files, which anybody may read: what they show is asked for with the token."""
    page = APIRouter(include_in_schema=False)

    def add(path: str, package: str, name: str, media_type: str) -> None:
        content = resources.files(package).joinpath(name).read_bytes()

        @page.get(path)
        async def file() -> Response:
            return Response(content, media_type=media_type, headers=_HEADERS)

    add("/", __name__, "page.html", "text/html")
    for path, source in _FILES.items():
        add(f"/page/{path}", *source)
    app.include_router(page)
