"""The edge to MongoDB: one client, foreign errors mapped, bulk writes read operation by operation.

Kept within what both MongoDB and the embedded server (nx-27017) do alike. What the latter gets
wrong, and what is therefore not used: ``$or`` beside other keys of an update's filter (it changes
other documents; inside ``$and`` it is right), ``find_one_and_update``, ``$not``, ``$nor`` on
absent fields, update pipelines, dates at the top level of an update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from bson.errors import BSONError
from pymongo import DeleteOne, InsertOne, MongoClient, UpdateOne
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    DocumentTooLarge,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WriteError,
)

from common.errors import ConfigError, StoreRefused, StoreUnavailable, one_line
from common.urls import redact
from config.settings import StoreSettings

Document = dict[str, Any]
Operation = InsertOne[Document] | UpdateOne | DeleteOne

DUPLICATE_KEY = 11000
_AUTHENTICATION_FAILED = 18
# Codes of what passes by itself: elections and shutdowns; time-outs, conflicts, a full disk.
_ELECTION = frozenset((91, 133, 189, 10058, 10107, 11600, 11602, 13435, 13436))
_BUSY = frozenset((6, 7, 24, 46, 50, 63, 64, 89, 112, 134, 150, 202, 262, 9001, 13388, 14031))
_PASSING = _ELECTION | _BUSY

_UNWRITABLE = (BSONError, DocumentTooLarge, UnicodeEncodeError, OverflowError)

log = structlog.get_logger()


class MongoEdge:
    """The two collections, reached when they are first used."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._client: MongoClient[Document] | None = None

    @property
    def url(self) -> str:
        """The database's URL as it may be shown."""
        return redact(self.settings.url)

    @property
    def posts(self) -> Collection[Document]:
        """The platform's posts."""
        return self._database[self.settings.collection]

    @property
    def jobs(self) -> Collection[Document]:
        """Our jobs."""
        return self._database[self.settings.jobs_collection]

    @property
    def leases(self) -> Collection[Document]:
        """What only one King does at a time: a document each. No jobs, hence not among them."""
        return self._database[f"{self.settings.jobs_collection}_leases"]

    @property
    def _database(self) -> Database[Document]:
        if self._client is None:
            timeout_ms = round(self.settings.timeout_s * 1000)
            try:
                self._client = MongoClient(
                    self.settings.url,
                    appname="insighttag",
                    tz_aware=True,
                    w="majority",
                    wTimeoutMS=timeout_ms,
                    serverSelectionTimeoutMS=timeout_ms,
                    connectTimeoutMS=timeout_ms,
                    socketTimeoutMS=timeout_ms,
                    # A platform's document may hold what Python has no name for; one that could
                    # not be read would end the store thread, again at every redelivery.
                    datetime_conversion="DATETIME_AUTO",
                    unicode_decode_error_handler="replace",
                )
            except (InvalidURI, ConfigurationError, ValueError) as error:
                raise ConfigError(f"store.url: {self.url}: {_one_line(error)}") from error
        return self._client[self.settings.database]

    def connect(self) -> None:
        """Reach the database and make the index of the jobs.

        Raises:
            StoreUnavailable: It cannot be reached now.
            ConfigError: It refuses the user or the password.
        """
        with self.edge():
            try:
                self._database.command("ping")
            except OperationFailure as error:
                if error.code == _AUTHENTICATION_FAILED:
                    raise ConfigError(f"store.url: {self.url}: {_one_line(error)}") from error
                raise
            try:
                self.jobs.create_index([("state", 1), ("due_at", 1)])
            except OperationFailure as error:  # no right to make indexes: slower, not wrong
                log.warning("store.index_refused", error=_one_line(error))

    def close(self) -> None:
        """Close the connections; a later use opens them again."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def edge(self) -> Iterator[None]:
        """Map what pymongo raises.

        Raises:
            StoreRefused: A single write was refused, and will be again; or what was asked or
                read has no BSON.
            StoreUnavailable: Anything else that pymongo raised inside.
        """
        try:
            yield
        except WriteError as error:
            kind = StoreUnavailable if error.code in _PASSING else StoreRefused
            raise kind(f"{self.url}: {_one_line(error)}") from error
        except _UNWRITABLE as error:
            raise StoreRefused(f"{self.url}: {_one_line(error)}") from error
        except PyMongoError as error:
            raise StoreUnavailable(f"{self.url}: {_one_line(error)}") from error

    def bulk(
        self, collection: Collection[Document], operations: Sequence[Operation]
    ) -> tuple[int, dict[int, tuple[int, str]]]:
        """Write, unordered, with majority write concern.

        Returns:
            How many operations took effect, and for each that was refused its position ─► code
            and one line.

        Raises:
            StoreUnavailable: Whether they took effect is not known; writing again does no harm.
        """
        if not operations:
            return 0, {}
        try:
            with self.edge():
                result = collection.bulk_write(operations, ordered=False).bulk_api_result
            return _effective(result), {}
        except (StoreRefused, StoreUnavailable) as error:
            cause = error.__cause__
            if isinstance(cause, BulkWriteError) and not cause.details.get("writeConcernErrors"):
                refused = _refused(cause.details)
                if any(code in _PASSING for code, _ in refused.values()):
                    raise
                return _effective(cause.details), refused
            if not isinstance(cause, _UNWRITABLE):
                raise
            return self._one_by_one(collection, operations, cause)

    def _one_by_one(
        self,
        collection: Collection[Document],
        operations: Sequence[Operation],
        error: BaseException,
    ) -> tuple[int, dict[int, tuple[int, str]]]:
        """Find the operation that cannot be encoded, so that it does not hold up the others."""
        if len(operations) == 1:
            return 0, {0: (0, _one_line(error))}
        effective = 0
        refused: dict[int, tuple[int, str]] = {}
        for i, operation in enumerate(operations):
            count, failed = self.bulk(collection, [operation])
            effective += count
            if failed:
                refused[i] = failed[0]
        return effective, refused


def _effective(result: Mapping[str, Any]) -> int:
    return sum(int(result.get(key) or 0) for key in ("nInserted", "nMatched", "nUpserted"))


def _refused(details: Mapping[str, Any]) -> dict[int, tuple[int, str]]:
    return {
        int(error["index"]): (int(error.get("code") or 0), str(error.get("errmsg"))[:300])
        for error in details.get("writeErrors") or ()
    }


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return text.split(", Timeout:")[0].split(", full error:")[0][:300]
