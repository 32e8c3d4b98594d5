"""The error tree.

What is a `RetryableError` may succeed on a later attempt, a `PermanentError` never; a `ConfigError`
is the user's. Foreign exceptions are mapped at the edge that meets them, with ``raise ... from``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType


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
    return kind(f"{what}: {error.strerror or one_line(error)}")
