"""The error tree.

    TaggingError
    ├── RetryableError      may succeed on a later attempt: the post comes back with back-off
    │   ├── FetchRetryable      time-out, reset connection, HTTP 408, 425, 429, 5xx
    │   ├── WorkerDied          a worker process died or ran past its deadline with the task
    │   ├── StoreUnavailable    the database cannot be reached
    │   └── BrokerUnavailable   the broker cannot be reached
    ├── PermanentError      no attempt can succeed
    │   ├── FetchRefused        404, too large, forbidden address, not a media type
    │   ├── MediaError          the file cannot be decoded
    │   ├── MessageError        the queue message cannot be read
    │   ├── PostNotFound        the ID is not in the posts collection
    │   ├── NothingUsable       no modality of the post could be used
    │   ├── FeatureError        a feature file or array is not what its reader needs
    │   ├── StoreRefused        the database is there, and refuses a write for good
    │   └── BundleError         a bundle is missing, broken, or made for other features
    └── ConfigError         the user's input or configuration is wrong; commands exit 2

Foreign exceptions are mapped to these at the edge that meets them, with ``raise ... from``.
"""

from __future__ import annotations


class TaggingError(Exception):
    """Base of every error that InsightTag raises on purpose."""


class RetryableError(TaggingError):
    """May succeed on a later attempt."""


class FetchRetryable(RetryableError):
    """A download failed in a way that may pass."""


class WorkerDied(RetryableError):
    """A worker process died, or was killed past its deadline, while it held the task."""


class StoreUnavailable(RetryableError):
    """The database cannot be reached."""


class BrokerUnavailable(RetryableError):
    """The message broker cannot be reached."""


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
