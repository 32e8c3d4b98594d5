"""Read a request's body into a `Post`: JSON with URLs, or a form with files.

    {"text": "...", "images": ["https://..."], "videos": [], "audios": [], "post_id": "p1"}

In JSON a source is a URL, never a path: only uploads are read from this machine's disk. They are
streamed into our own spool folder, under names of ours, and removed when their request ends.
"""

from __future__ import annotations

import errno
import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from socket import SHUT_RD
from typing import IO, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, StrictStr
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.wrappers import Request
from werkzeug.wsgi import get_input_stream

from common.errors import ConfigError, MessageError, one_line
from common.post import Media, Post, clean
from config.load import validate
from config.section import Section
from config.settings import HttpSettings
from fusion.data.data_file import MEDIA_KEYS
from king.messages import PostMessage, parse_message
from web.guard import ApiError, bad_request, too_large
from workers.fetch import Spool


class Box:
    """The files of one request."""

    def __init__(self, folder: Path, max_files: int) -> None:
        self._folder = folder
        self._max_files = max_files
        self._files: list[IO[bytes]] = []
        self.paths: list[Path] = []

    def stream(
        self,
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        """Return a file to write into; a stream factory for Werkzeug's form parser.

        We choose its name: the client's file name is never a path here.
        """
        del total_content_length, content_type, filename, content_length
        if len(self.paths) >= self._max_files:
            raise too_large(f"more than {self._max_files} files (http.max_files)")
        path = self._folder / f"upload-{secrets.token_hex(16)}"
        file = path.open("x+b")
        self.paths.append(path)
        self._files.append(file)
        return file

    def finish(self) -> None:
        """Flush and close the files after the last byte."""
        for file in self._files:
            file.close()

    def empty(self) -> None:
        """Remove the files."""
        for file in self._files:
            with suppress(OSError):  # a full disk: some bytes could not be flushed
                file.close()
        for path in self.paths:
            path.unlink(missing_ok=True)


class Uploads:
    """A spool folder for uploads; created by the constructor, removed by `close`."""

    def __init__(self, root: Path, *, max_files: int) -> None:
        """Create the folder, and remove those of dead processes."""
        self._spool = Spool(root)
        self._max_files = max_files

    @property
    def folder(self) -> Path:
        return self._spool.folder

    @contextmanager
    def box(self) -> Iterator[Box]:
        """Yield a box for a request's files, removed at its end; ApiError on a full disk."""
        box = Box(self.folder, self._max_files)
        try:
            yield box
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            status = HTTPStatus.INSUFFICIENT_STORAGE
            raise ApiError(status, "SpoolFull", "there is no disk space for the upload") from error
        finally:
            box.empty()

    def hide(self, text: str) -> str:
        """Return a message without our paths."""
        return text.replace(f"{self.folder}/", "")

    def close(self) -> None:
        """Remove the folder."""
        self._spool.close()


_FIELDS = ("text", "post_id", *MEDIA_KEYS.values())
_MAX_URL_CHARS = 8192
_FORM_TEXT_BYTES_PER_CHAR = 4

_Body = TypeVar("_Body", bound=Section)


class TagBody(Section):
    """The JSON body; unknown keys are refused."""

    post_id: StrictStr | None = None
    text: StrictStr = ""
    images: tuple[StrictStr, ...] = Field(default=())
    videos: tuple[StrictStr, ...] = Field(default=())
    audios: tuple[StrictStr, ...] = Field(default=())


class QueueBody(Section):
    """The optional JSON body of a post that goes onto the queue."""

    priority: int = Field(default=0, ge=0, le=9, strict=True)
    force: bool = Field(default=False, strict=True)


def read_post(request: Request, box: Box, limits: HttpSettings) -> Post:
    """Return the post that a JSON body or a form describes; the box takes its files.

    Raises ApiError 400, 408, 413 or 415, naming the mistake.
    """
    if request.mimetype == "application/json":
        return _of_json(read_json(request, limits), limits)
    if request.mimetype == "multipart/form-data":
        return _of_form(request, box, limits)
    mimetype = request.mimetype or "none"
    raise ApiError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "UnsupportedMediaType",
        f"the content type is {mimetype}; send application/json or multipart/form-data",
    )


def read_json(request: Request, limits: HttpSettings) -> object:
    """Return the JSON of a body; ApiError when it is too large, too late, or not JSON."""
    with _body(request, limits, limits.max_json_bytes, "http.max_json_bytes") as stream:
        raw = stream.read()
    if len(raw) > limits.max_json_bytes:
        raise too_large(f"the JSON is over {limits.max_json_bytes} bytes (http.max_json_bytes)")
    if not raw:
        raise bad_request("the body is empty")
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise bad_request(f"the JSON is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise bad_request(f"not JSON: {' '.join(str(error).split())[:200]}") from error


def read_queue_body(request: Request, limits: HttpSettings) -> QueueBody:
    """Return priority and force; a request without a body has neither."""
    if not request.content_length and "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return QueueBody()
    if request.mimetype != "application/json":
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "UnsupportedMediaType",
            "a body of this request is application/json",
        )
    return _validated(QueueBody, read_json(request, limits))


def checked_id(post_id: str) -> str:
    """Return the ID as the daemon would read it; ApiError when the text cannot be an ID."""
    try:
        return parse_message(PostMessage(post_id).encode()).post_id
    except (MessageError, UnicodeEncodeError) as error:
        raise bad_request(f"post_id: {error}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _validated(model: type[_Body], content: object) -> _Body:
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return validate(model, content, "body")
    except ConfigError as error:
        raise bad_request(str(error)[:500]) from error


def _of_json(content: object, limits: HttpSettings) -> Post:
    body = _validated(TagBody, content)
    sources = {"images": body.images, "videos": body.videos, "audios": body.audios}
    media = [
        Media(kind, _url(source, f"{name}.{i}"))
        for kind, name in MEDIA_KEYS.items()
        for i, source in enumerate(sources[name])
    ]
    return _post(body.post_id, body.text, media, limits)


def _of_form(request: Request, box: Box, limits: HttpSettings) -> Post:
    with _body(request, limits, limits.max_body_bytes, "http.max_body_bytes") as stream:
        try:
            parser = FormDataParser(
                stream_factory=box.stream,
                max_form_memory_size=max(
                    limits.max_text_chars * _FORM_TEXT_BYTES_PER_CHAR, _MAX_URL_CHARS
                ),
                max_form_parts=limits.max_files * 2 + len(_FIELDS),
                silent=False,
            )
            options = request.mimetype_params
            _, form, files = parser.parse(
                stream, "multipart/form-data", request.content_length, options
            )
        except ValueError as error:
            reason = one_line(error, 200)
            raise bad_request(f"the form cannot be read: {reason}") from error
    box.finish()
    unknown = next((name for name in [*form, *files] if name not in _FIELDS), None)
    if unknown is not None:
        raise bad_request(f"{unknown[:100]!r} is not a field; use {', '.join(_FIELDS)}")
    stray = next((name for name in ("text", "post_id") if name in files), None)
    if stray is not None:
        raise bad_request(f"{stray} must be text, not a file")
    media: list[Media] = []
    for kind, name in MEDIA_KEYS.items():
        urls = [line.strip() for value in form.getlist(name) for line in value.splitlines()]
        media += [Media(kind, _url(url, name)) for url in urls if url]
        media += [Media(kind, _path(file)) for file in files.getlist(name) if file.filename]
    post_id = form.get("post_id", "").strip() or None
    return _post(post_id, "\n".join(form.getlist("text")), media, limits)


def _path(file: FileStorage) -> str:
    path: str = file.stream.name  # ours: see `Box.stream`
    return path


def _post(post_id: str | None, text: str, media: Sequence[Media], limits: HttpSettings) -> Post:
    if len(text) > limits.max_text_chars:
        raise too_large(f"the text is over {limits.max_text_chars} characters")
    if len(media) > limits.max_files:
        raise too_large(f"more than {limits.max_files} files and URLs (http.max_files)")
    name = checked_id(post_id) if post_id is not None else f"http-{secrets.token_hex(8)}"
    if not text.strip() and not media:
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "NothingUsable", "the post has no text and no media"
        )
    return Post(name, text=clean(text), media=tuple(media))


def _url(source: str, where: str) -> str:
    """Return a source that the downloader may fetch; never a path."""
    if len(source) > _MAX_URL_CHARS:
        raise bad_request(f"{where}: the URL is over {_MAX_URL_CHARS} characters")
    try:
        parts = urlsplit(source)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good or any(ord(character) < 33 for character in source):
        raise bad_request(f"{where}: must be an http:// or https:// URL")
    return source


@contextmanager
def _body(
    request: Request, limits: HttpSettings, max_bytes: int, setting: str
) -> Iterator[IO[bytes]]:
    """Yield the body's stream, bounded in bytes and in time."""
    if (request.content_length or 0) > max_bytes:
        raise too_large(f"the body is over {max_bytes} bytes ({setting})")
    late = threading.Event()
    socket = request.environ.get("gunicorn.socket")

    def stop() -> None:
        late.set()
        if socket is not None:
            with suppress(OSError):
                socket.shutdown(SHUT_RD)

    timer = threading.Timer(limits.body_timeout_s, stop)
    timer.daemon = True
    timer.start()
    try:
        # One byte above the limit, so that the reader sees that there is more.
        yield get_input_stream(request.environ, max_content_length=max_bytes + 1)
    except RequestEntityTooLarge as error:
        raise too_large(f"the body, or a part of it, is too large ({setting})") from error
    except (ClientDisconnected, ApiError, OSError) as error:
        if late.is_set():
            raise _late(limits) from error
        # gunicorn's error for a stream that ends early has no number, a full disk's has one.
        is_gone = isinstance(error, ConnectionError) or getattr(error, "errno", None) is None
        if isinstance(error, ApiError) or not is_gone:
            raise
        raise bad_request("the body ended early") from error
    finally:
        timer.cancel()
    if late.is_set():
        raise _late(limits)


def _late(limits: HttpSettings) -> ApiError:
    message = f"the body did not arrive within {limits.body_timeout_s:g} s (http.body_timeout_s)"
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "RequestTimeout", message)
