"""Wrap every request: an ID, refusals as JSON, safe headers, and one line in the log.

    {"error": {"type": "NothingUsable", "message": "...", "reasons": {"image": "..."}}}

An error of the server is a 500 with one line; its traceback is in the log alone.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import structlog
from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from common.errors import (
    ConfigError,
    DeadlineExceeded,
    MessageError,
    NothingUsable,
    RetryableError,
    TaggingError,
    one_line,
)
from config.settings import HttpSettings


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        *,
        reasons: Mapping[str, str] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Describe the refusal: HTTP status, name for programs, one line for a person.

        ``reasons`` says for each modality why it could not be used.
        """
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.reasons = reasons
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    @property
    def document(self) -> dict[str, Any]:
        error: dict[str, Any] = {"type": self.type, "message": self.message}
        if self.reasons:
            error["reasons"] = dict(self.reasons)
        return {"error": error}


def bad_request(message: str) -> ApiError:
    """Return a 400 with one line."""
    return ApiError(HTTPStatus.BAD_REQUEST, "BadRequest", message)


def too_large(message: str) -> ApiError:
    """Return a 413 with one line."""
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)


def of_http(error: HTTPException) -> ApiError:
    """Map the errors of Flask and Werkzeug: 404, 405, 413 and others."""
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    phrase = HTTPStatus(status).phrase
    message = " ".join((error.description or phrase).split())
    refusal = ApiError(status, "".join(phrase.title().split()), message)
    for name, value in error.get_headers():
        if name.lower() == "allow":
            refusal.headers[name] = value
    return refusal


def of_tagging(error: TaggingError, *, retry_after_s: int) -> ApiError:
    """Map an error of tagging, of the queue or of the database."""
    name = type(error).__name__
    message = one_line(error)
    if isinstance(error, MessageError):
        return bad_request(message)
    if isinstance(error, NothingUsable) or error.reasons:
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        return ApiError(status, NothingUsable.__name__, message, reasons=error.reasons)
    if isinstance(error, DeadlineExceeded):
        return ApiError(HTTPStatus.GATEWAY_TIMEOUT, name, message)
    if isinstance(error, (RetryableError, ConfigError)):
        status = HTTPStatus.SERVICE_UNAVAILABLE
        return ApiError(status, name, message, retry_after_s=retry_after_s)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, name, message)


_POLICY = "default-src 'none'; frame-ancestors 'none'"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = structlog.get_logger()


def note(**facts: Any) -> None:
    """Add fields to the request's line in the log; never payloads."""
    g.facts.update(facts)


Answered = Callable[[str | None, int, str, float], object]
"""Called for each answer: its endpoint, status, type of error or "", and the seconds it took."""


def guard(app: Flask, settings: HttpSettings, on_answer: Answered) -> None:
    """Install the guards of an application."""

    def refuse(error: ApiError) -> Response:
        note(error=error.type, reason=error.message[:200])
        response = jsonify(error.document)
        response.status_code = error.status
        response.headers.update(error.headers)
        return response

    def on_http(error: HTTPException) -> Response:
        return refuse(of_http(error))

    def on_tagging(error: TaggingError) -> Response:
        return refuse(of_tagging(error, retry_after_s=settings.retry_after_s))

    def on_anything(error: Exception) -> Response:
        log.error("http.failed", request_id=g.request_id, exc_info=error)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        message = f"internal server error; request ID {g.request_id}"
        return refuse(ApiError(status, "InternalError", message))

    app.before_request(_begin)
    names = {_plain(name) for name in ("localhost", settings.host, *settings.allowed_hosts)}
    app.before_request(partial(_check_host, names))
    app.before_request(_check_origin)
    app.register_error_handler(ApiError, refuse)
    app.register_error_handler(HTTPException, on_http)
    app.register_error_handler(TaggingError, on_tagging)
    app.register_error_handler(Exception, on_anything)
    app.after_request(partial(_end, on_answer))


def _begin() -> None:
    sent = request.headers.get("X-Request-ID", "")
    g.request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
    g.began = time.perf_counter()
    g.facts = {}


def _check_host(names: AbstractSet[str]) -> None:
    """Refuse foreign host names: anybody can point a name at this machine (DNS rebinding)."""
    try:
        name = _plain(urlsplit(f"//{request.host}").hostname or "")
    except ValueError:
        name = ""
    if name not in names and not _is_address(name):
        reason = f"the request is addressed to {name[:253]!r}, which is not in http.allowed_hosts"
        raise ApiError(HTTPStatus.FORBIDDEN, "Forbidden", reason)


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _check_origin() -> None:
    """Refuse pages of other sites in a browser that can reach this server."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    origin = request.headers.get("Origin")
    try:
        foreign = origin is not None and urlsplit(origin).netloc != request.host
    except ValueError as error:
        raise bad_request("the header Origin is not a URL") from error
    if foreign or request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise ApiError(HTTPStatus.FORBIDDEN, "Forbidden", "the request comes from another site")


def _end(on_answer: Answered, response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    response.headers.setdefault("Content-Security-Policy", _POLICY)
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")
    seconds = time.perf_counter() - g.began
    on_answer(request.endpoint, response.status_code, g.facts.get("error", ""), seconds)
    quiet = request.endpoint in ("healthz", "readyz", "assets", "metrics")
    (log.debug if quiet else log.info)(
        "http.request",
        request_id=g.request_id,
        method=request.method,
        route=str(request.url_rule) if request.url_rule else None,
        status=response.status_code,
        ms=round(seconds * 1000, 1),
        bytes_in=request.content_length,
        **g.facts,
    )
    return response
