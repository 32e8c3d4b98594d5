"""The page and what it is made of: files of this package, held in memory."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from flask import Response, request
from werkzeug.exceptions import NotFound

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FOLDER = Path(__file__).resolve().parent / "static"
_TYPES = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)


class Page:
    """The files by name."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir())}

    def answer(self, name: str) -> Response:
        """A file; asked for again each time by its ETag, so that a new release is seen at once.

        Raises:
            NotFound: There is none of this name.
        """
        content = self._files.get(name)
        kind = _TYPES.get(Path(name).suffix)
        if content is None or kind is None:
            raise NotFound
        response = Response(content, content_type=kind)
        response.headers["Cache-Control"] = "no-cache"
        if kind.startswith("text/html"):
            response.headers["Content-Security-Policy"] = PAGE_POLICY
        response.add_etag()
        response.make_conditional(request)  # in place: 304 without a body where it is known
        return response
