"""Refusals of a request: a status, a name and a line, as JSON.

    {"error": {"type": "NothingUsable", "message": "...", "reasons": {"image": "..."}}}

An error of the server is a 500 with one line; its traceback is in the log alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

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
        """Describe the refusal.

        Args:
            status: HTTP status code.
            type: Name of the error, for programs.
            message: One line for a person.
            reasons: Modality -> why it could not be used.
            retry_after_s: Value of Retry-After.
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
