"""The error tree.

What is a `RetryableError` may succeed on a later attempt, a `PermanentError` never; a `ConfigError`
is the user's. Foreign exceptions are mapped at the edge that meets them, with ``raise ... from``.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import cast


class TaggingError(Exception):
    """Base of every error that InsightTag raises on purpose.

    That of a post has its stage (``load``, ``fetch``, ``decode``, ``extract``, ``fuse``), and may
    have a reason for each modality.
    """

    reasons: Mapping[str, str] = MappingProxyType({})
    stage: str = ""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return an error's text on one line, cut to a limit, or else the name of its type."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


# By name and text: torch is not imported here, and may not be in a process at all. A library of
# CUDA that finds no memory has an error of its own.
_NO_MEMORY = ("can't allocate memory", "cuda error: out of memory", "_status_alloc_failed")
_LOST_DEVICE = ("device-side assert", "cuda error", "cublas_status", "cudnn_status_execution")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True where the memory of the host or a device was full: less may fit."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or _says(error, _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Return True for an error of CUDA that no later call in this process would survive."""
    return _says(error, _LOST_DEVICE) and not is_out_of_memory(error)


def _says(error: BaseException, signs: Sequence[str]) -> bool:
    kind = isinstance(error, RuntimeError) or type(error).__name__ == "AcceleratorError"
    text = str(error).lower()
    return kind and any(sign in text for sign in signs)


class RetryableError(TaggingError):
    """May succeed on a later attempt."""


class FetchRetryable(RetryableError):
    """A download failed in a way that may pass.

    `retry_after_s` is what the server asks for; of an unreachable host no other file will be had.
    """

    retry_after_s: float | None = None
    unreachable: bool = False


class WorkerDied(RetryableError):
    """A worker process died, or was killed past its deadline, while it held the task."""


class DeadlineExceeded(RetryableError):
    """A post took longer than its caller waits for it."""


class Busy(RetryableError):
    """The limit of posts in flight is reached."""


class StoreUnavailable(RetryableError):
    """The database cannot be reached."""


class CacheUnavailable(RetryableError):
    """The feature cache cannot be used; a post goes on without it."""


class BrokerUnavailable(RetryableError):
    """The message broker cannot be reached."""


class PublishRefused(RetryableError):
    """The broker is there and takes no message now: it is full, or has an alarm or no leader."""


class PermanentError(TaggingError):
    """No attempt can succeed."""


class FetchRefused(PermanentError):
    """A download that must not or cannot be made: missing, too large, forbidden address."""


class MediaError(PermanentError):
    """A media file cannot be decoded, or is not what it says it is."""


class MessageError(PermanentError):
    """A queue message cannot be read."""


class PostNotFound(PermanentError):
    """The post's ID is not in the posts collection."""


class NothingUsable(PermanentError):
    """No modality of the post could be used."""


class FeatureError(PermanentError):
    """A feature file or array is not what its reader needs."""


class StoreRefused(PermanentError):
    """The database is there, and refuses a write for good."""


class BundleError(PermanentError):
    """A bundle is missing, broken, or was made for other features."""


class ConfigError(TaggingError):
    """The user's input or configuration is wrong: one line names it and the way out."""


# A wrong path or missing rights. Others are temporary: a full disk, a quota, no descriptors left.
_WRONG_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP),
}


def path_error(what: str, error: OSError) -> ConfigError | RetryableError:
    """Return the error of a path in the settings: ConfigError, or RetryableError if temporary."""
    kind = ConfigError if error.errno in _WRONG_PATH else RetryableError
    in_the_way = isinstance(error, FileExistsError)  # of `Path.mkdir`
    return kind(
        f"{what}: {'a file is in the place of its folder' if in_the_way else reason(error)}"
    )


def told(what: str, *kinds: type[Exception], as_: type[TaggingError] = ConfigError) -> _RaisedAs:
    """Return a context whose errors, OSError by default, become one of ours: what, and why."""
    return _RaisedAs(kinds or (OSError,), lambda error: as_(f"{what}: {reason(error)}"))


def path_told(what: str) -> _RaisedAs:
    """Return a context whose OSErrors become those of a path in the settings: `path_error`."""
    return _RaisedAs((OSError,), lambda error: path_error(what, cast("OSError", error)))


def replaced(ours: TaggingError, *kinds: type[Exception]) -> _RaisedAs:
    """Return a context in which one of our errors takes the place of others, which say no more."""
    return _RaisedAs(kinds, lambda _: ours)


def reason(error: Exception) -> str:
    """Return why, on one line: of the system's errors without their number and file."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])  # of a folder that was copied, that of its first file
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


class _RaisedAs:
    # No generator: to mypy that might swallow the error, and leave a function without its value.
    def __init__(
        self, kinds: tuple[type[Exception], ...], made: Callable[[Exception], TaggingError]
    ) -> None:
        self._kinds, self._made = kinds, made

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and isinstance(error, self._kinds):
            raise self._made(error) from error
