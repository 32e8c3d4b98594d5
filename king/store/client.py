"""The client of MongoDB: collections, foreign errors mapped, bulk writes read one by one.

Some things are written or asked in a certain way only for nx-27017, the embedded server that speaks
MongoDB's protocol on SQLite; each form is correct for MongoDB too. Known faults of version 0.8.1:

    ``$or`` next to other keys of an update's filter changes other documents -> `all_of`
    a projection drops paths through lists, and names parts with dots       -> `whole_fields`
    ``$set`` of a date at the top level of a document stores text           -> jobs keep their times
        as numbers of seconds, which both servers compare and sort alike
    ``_id`` is sorted as text, and ``$type: objectId`` finds nothing        -> `is_embedded`
    ``find_one_and_update``, ``$not``, update pipelines and ``$nor`` on
        absent fields are wrong                                             -> not used
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

from common.errors import ConfigError, StoreRefused, StoreUnavailable
from common.urls import redact
from config.settings import StoreSettings

Document = dict[str, Any]
Operation = InsertOne[Document] | UpdateOne | DeleteOne

DUPLICATE_KEY = 11000
_AUTHENTICATION_FAILED = 18
# Codes of states that pass by themselves: elections and shutdowns; time-outs, conflicts, a full
# disk. A write that is refused with one of them is repeated; with any other it is given up.
_ELECTION = frozenset((91, 133, 189, 10058, 10107, 11600, 11602, 13435, 13436))
_BUSY = frozenset((6, 7, 24, 46, 50, 63, 64, 89, 112, 134, 150, 202, 262, 9001, 13388, 14031))
_PASSING = _ELECTION | _BUSY

_UNWRITABLE = (BSONError, DocumentTooLarge, UnicodeEncodeError, OverflowError)

log = structlog.get_logger()


class StoreClient:
    """The collections of one database, connected on first use."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._client: MongoClient[Document] | None = None

    @property
    def url(self) -> str:
        """Return the database's URL without its password."""
        return redact(self.settings.url)

    @property
    def posts(self) -> Collection[Document]:
        """Return the platform's posts."""
        return self.database[self.settings.collection]

    @property
    def jobs(self) -> Collection[Document]:
        """Our jobs."""
        return self.database[self.settings.jobs_collection]

    @property
    def leases(self) -> Collection[Document]:
        """Return the leases of work that only one King does; jobs would be skewed by them."""
        return self.database[f"{self.settings.jobs_collection}_leases"]

    @property
    def database(self) -> Database[Document]:
        """Return the database, connected on first use; ConfigError when the URL is malformed."""
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
                    # A platform's document may hold dates and texts that Python cannot represent.
                    # An error would end the store thread, again at every redelivery.
                    datetime_conversion="DATETIME_AUTO",
                    unicode_decode_error_handler="replace",
                )
            except (InvalidURI, ConfigurationError, ValueError) as error:
                raise ConfigError(f"store.url: {self.url}: {_one_line(error)}") from error
        return self._client[self.settings.database]

    def connect(self) -> None:
        """Reach the database and create the index of the jobs.

        Raises StoreUnavailable, and ConfigError when it refuses the user or the password.
        """
        with self.edge():
            try:
                self.database.command("ping")
            except OperationFailure as error:
                if error.code == _AUTHENTICATION_FAILED:
                    raise ConfigError(f"store.url: {self.url}: {_one_line(error)}") from error
                raise
            try:
                self.jobs.create_index([("state", 1), ("due_at", 1)])
            except OperationFailure as error:  # no right to create indexes: slower, not wrong
                log.warning("store.index_refused", error=_one_line(error))

    def close(self) -> None:
        """Close the connections; a later use opens them again."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    @contextmanager
    def edge(self) -> Iterator[None]:
        """Map the errors of pymongo to StoreRefused (for good) or StoreUnavailable."""
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

        Return the number of operations that took effect, and for each refused one its position ->
        code and reason. After StoreUnavailable it is not known; writing again does no harm.
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
    """Return pymongo's reason without the description of its topology."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(", Timeout:")[0].split(", full error:")[0][:300]


def all_of(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a filter that holds where every condition holds, one of them perhaps an ``$or``."""
    return {"$and": [dict(condition) for condition in conditions]}


def is_embedded(client: MongoClient[dict[str, Any]]) -> bool:
    """Return True for nx-27017: MongoDB states its version in parts as well."""
    return "versionArray" not in client.admin.command("buildInfo")
