"""Errors of kombu and the libraries below it ─► ours.

BrokerUnavailable   the connection is lost or was refused: connect again, with back-off
ConfigError         no attempt can succeed: credentials, virtual host, another queue's arguments
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import amqp.exceptions as amqp_errors
import redis.exceptions as redis_errors
from kombu.exceptions import KombuError

from common.errors import BrokerUnavailable, ConfigError, TaggingError, one_line
from common.urls import redact

# While a connection is set up, these say that the settings are wrong; later, that it is lost.
_WRONG_SETTINGS: tuple[type[Exception], ...] = (
    amqp_errors.AccessRefused,
    amqp_errors.NotAllowed,
    amqp_errors.PreconditionFailed,
    amqp_errors.ResourceLocked,
    amqp_errors.AMQPNotImplementedError,
    amqp_errors.InvalidPath,
    redis_errors.AuthenticationError,
    redis_errors.AuthorizationError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
    redis_errors.NoPermissionError,
)

# Answers of a Redis that is there but cannot serve now; other refusals are wrong settings.
_REDIS_LATER: tuple[type[Exception], ...] = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.ExecAbortError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
    redis_errors.NoScriptError,
)
_REDIS_LATER_WORDS = {"LOADING", "MISCONF", "MASTERDOWN", "NOREPLICAS", "UNKILLABLE", "BUSY"}

# AttributeError, KeyError and struct.error are what py-amqp and kombu raise on a connection that
# another event has torn down under them; only their code runs inside `mapped`.
FOREIGN: tuple[type[BaseException], ...] = (
    amqp_errors.AMQPError,
    redis_errors.RedisError,
    amqp_errors.MessageNacked,  # not an AMQPError
    KombuError,
    OSError,
    EOFError,
    AttributeError,
    KeyError,
    struct.error,
)


@contextmanager
def mapped(url: str, *, setup: bool = False) -> Iterator[None]:
    """Map foreign errors of the block.

    Args:
        url: The broker's URL; shown without its password.
        setup: The block connects and declares: a refusal then means wrong settings.

    Raises:
        ConfigError: The broker refuses what the settings say.
        BrokerUnavailable: It cannot be reached, or the connection is lost.
    """
    try:
        yield
    except TaggingError:
        raise
    except FOREIGN as error:
        text = f"broker {redact(url)}: {_reason(error, url)}"
        if setup and _is_wrong_settings(error):
            raise ConfigError(text) from error
        raise BrokerUnavailable(text) from error


def _is_wrong_settings(error: BaseException) -> bool:
    if isinstance(error, _WRONG_SETTINGS):
        return True
    if not isinstance(error, redis_errors.ResponseError) or isinstance(error, _REDIS_LATER):
        return False
    return not any(word in _REDIS_LATER_WORDS for word in str(error).split())


def _reason(error: BaseException, url: str) -> str:
    """One line that a person understands, without credentials."""
    text = one_line(error)
    if text == TimeoutError.__name__:
        text = "timed out"
    if isinstance(error, amqp_errors.PreconditionFailed):
        text = (
            f"the queue exists with other arguments ({text}); "
            "delete it, set the same arguments, or name another broker.queue"
        )
    elif isinstance(error, (amqp_errors.AccessRefused, redis_errors.AuthenticationError)):
        text = f"user or password refused, or no permission ({text})"
    for secret in _secrets(url):
        text = text.replace(secret, "***")
    return text


def _secrets(url: str) -> set[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return set()
    # Short passwords are words like "guest", which the broker's answer uses for the user's name.
    return {p for p in (password, unquote(password or "")) if p and len(p) > 5}
