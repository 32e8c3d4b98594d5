"""The client of MongoDB: collections, foreign errors mapped, bulk writes read one by one.

Some things are written or asked in a certain way only for nx-27017, the embedded server that speaks
MongoDB's protocol on SQLite; each form is correct for MongoDB too. Known faults of version 0.8.1:

    ``$or`` next to other keys of an update's filter changes other documents -> `all_of`
    a projection drops paths through lists, and names parts with dots       -> `whole_fields`
    ``$set`` of a date at the top level of a document stores text           -> jobs keep their times
        as numbers of seconds, which both servers compare and sort alike
    ``_id`` is sorted as text, and ``$type: objectId`` finds nothing        -> `is_embedded`
    a query for a value of some types fails as a whole                      -> `StoreClient.named`
    ``find_one_and_update``, ``$not``, update pipelines and ``$nor`` on
        absent fields are wrong                                             -> not used
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import structlog
from bson import ObjectId
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
from king.store.documents import id_candidates

Document = dict[str, Any]
Operation = InsertOne[Document] | UpdateOne | DeleteOne

DUPLICATE_KEY = 11000
_AUTHENTICATION_FAILED = 18
# Codes of writes that can never succeed, whatever the state of the server: duplicate keys, values
# that break a rule of the collection or of an index, keys and documents that are too large. Every
# other code, also one that we do not know, is a reason to write again: giving up loses tags.
_PERMANENT = frozenset(
    (
        *(DUPLICATE_KEY, 2, 9, 14, 22, 28, 52, 55, 56, 57, 66, 121, 171),
        *(10334, 16755, 17280, 17419, 17420),
    )
)
_UNWRITABLE = (BSONError, DocumentTooLarge, UnicodeEncodeError, OverflowError, RecursionError)
# The types that nx-27017 can look for; with any other it refuses the whole query.
_EMBEDDED_TYPES = (str, int, ObjectId, datetime)
_INT64 = 1 << 63

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A write that the database refused; unless that is permanent, it may be repeated later."""

    reason: str
    is_permanent: bool
    is_duplicate: bool = False


@dataclass(frozen=True, slots=True)
class BulkResult:
    """The number of writes that took effect, and position -> refusal of those that did not."""

    effective: int
    refused: Mapping[int, Refusal]


class StoreClient:
    """The collections of one database, connected on first use."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._client: MongoClient[Document] | None = None
        self._collections: dict[str, Collection[Document]] = {}
        self._is_embedded: bool | None = None
        self._clock_ahead_s: float | None = None  # of the monotonic clock

    @property
    def url(self) -> str:
        """Return the database's URL without its password."""
        return redact(self.settings.url)

    @property
    def posts(self) -> Collection[Document]:
        """Return the platform's posts."""
        return self._collection(self.settings.collection)

    @property
    def jobs(self) -> Collection[Document]:
        """Return the collection of jobs."""
        return self._collection(self.settings.jobs_collection)

    @property
    def leases(self) -> Collection[Document]:
        """Return the leases of work that only one King does; jobs would be skewed by them."""
        return self._collection(f"{self.settings.jobs_collection}_leases")

    def _collection(self, name: str) -> Collection[Document]:
        # Kept: pymongo makes a new one each time, with options of its own that it reads again.
        if name not in self._collections:
            self._collections[name] = self.database[name]
        return self._collections[name]

    @property
    def database(self) -> Database[Document]:
        """Return the database, connected on first use.

        Raises ConfigError when the URL is malformed or its ``mongodb+srv`` name does not exist, and
        StoreUnavailable when the name servers do not answer.
        """
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
                text = f"store.url: {self.url}: {_one_line(error)}"
                raise (StoreUnavailable if _may_pass(error) else ConfigError)(text) from error
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
            self.read_clock()
            try:
                self.jobs.create_index([("state", 1), ("due_at", 1)])
            except OperationFailure as error:  # no right to create indexes: slower, not wrong
                log.warning("store.index_refused", error=_one_line(error))

    @property
    def now(self) -> float:
        """Return the time of the database in Unix seconds, as of the last look at its clock.

        Hosts agree on it, and between two looks it moves as the monotonic clock does.
        """
        if self._clock_ahead_s is None:
            return time.time()
        return time.monotonic() + self._clock_ahead_s

    def read_clock(self) -> None:
        """Ask the database for its time."""
        with self.edge():
            began = time.monotonic()
            at = self.database.command("hello").get("localTime")
            if isinstance(at, datetime):
                middle = (began + time.monotonic()) / 2
                self._clock_ahead_s = at.replace(tzinfo=timezone.utc).timestamp() - middle
            else:  # a server that only speaks like MongoDB
                self._clock_ahead_s = time.time() - time.monotonic()

    def close(self) -> None:
        """Close the connections; a later use opens them again."""
        client, self._client = self._client, None
        self._collections.clear()
        if client is not None:
            client.close()

    @contextmanager
    def edge(self) -> Iterator[None]:
        """Map the errors of pymongo to StoreRefused (for good) or StoreUnavailable."""
        try:
            yield
        except WriteError as error:
            kind = StoreRefused if error.code in _PERMANENT else StoreUnavailable
            raise kind(f"{self.url}: {_one_line(error)}") from error
        except _UNWRITABLE as error:
            raise StoreRefused(f"{self.url}: {_one_line(error)}") from error
        except PyMongoError as error:
            raise StoreUnavailable(f"{self.url}: {_one_line(error)}") from error

    def named(self, post_ids: Iterable[str]) -> Document:
        """Return the filter of the documents that IDs may name; call it inside `edge`."""
        values = [value for post_id in post_ids for value in id_candidates(post_id)]
        if self.is_embedded:
            values = [value for value in values if _is_found_embedded(value)]
        return {self.settings.fields.id: {"$in": values}}

    @property
    def is_embedded(self) -> bool:
        """Return True for nx-27017: MongoDB states its version in parts as well."""
        if self._is_embedded is None:
            self._is_embedded = "versionArray" not in self.database.client.admin.command(
                "buildInfo"
            )
        return self._is_embedded

    def bulk(self, collection: Collection[Document], operations: Sequence[Operation]) -> BulkResult:
        """Write, unordered, with majority write concern.

        After StoreUnavailable some may have taken effect; writing all again does no harm.
        """
        if not operations:
            return BulkResult(0, {})
        try:
            with self.edge():
                result = collection.bulk_write(operations, ordered=False).bulk_api_result
            return BulkResult(_effective(result), {})
        except (StoreRefused, StoreUnavailable) as error:
            cause = error.__cause__
            if isinstance(cause, BulkWriteError) and not cause.details.get("writeConcernErrors"):
                return BulkResult(_effective(cause.details), _refusals(cause.details))
            if not isinstance(cause, _UNWRITABLE):
                raise
            if len(operations) == 1:
                return BulkResult(0, {0: Refusal(_one_line(cause), is_permanent=True)})
        # One of them cannot be encoded, and must not hold up the others.
        effective = 0
        refused: dict[int, Refusal] = {}
        for i, operation in enumerate(operations):
            alone = self.bulk(collection, [operation])
            effective += alone.effective
            if alone.refused:
                refused[i] = alone.refused[0]
        return BulkResult(effective, refused)


def _is_found_embedded(value: object) -> bool:
    """Return True for a value that nx-27017 finds, and updates too.

    Bools and doubles beyond int64 it finds by some queries only, and updates never.
    """
    if isinstance(value, float):
        return abs(value) < _INT64
    return isinstance(value, _EMBEDDED_TYPES) and not isinstance(value, bool)


def _may_pass(error: BaseException) -> bool:
    """Return True for a look-up of a ``mongodb+srv`` name that had no answer."""
    from dns import exception, resolver  # pymongo imports it only for such a URL

    cause = error.__cause__
    is_wrong_name = isinstance(cause, (resolver.NXDOMAIN, resolver.NoAnswer))
    return isinstance(cause, (exception.DNSException, OSError)) and not is_wrong_name


def _effective(result: Mapping[str, Any]) -> int:
    return sum(int(result.get(key) or 0) for key in ("nInserted", "nMatched", "nUpserted"))


def _refusals(details: Mapping[str, Any]) -> dict[int, Refusal]:
    refused = {}
    for error in details.get("writeErrors") or ():
        code = int(error.get("code") or 0)
        refused[int(error["index"])] = Refusal(
            f"{str(error.get('errmsg'))[:300]} (code {code})",
            is_permanent=code in _PERMANENT,
            is_duplicate=code == DUPLICATE_KEY,
        )
    return refused


def _one_line(error: BaseException) -> str:
    """Return pymongo's reason without the description of its topology."""
    text = " ".join(str(error).split()) or type(error).__name__
    for rest in (", Timeout:", ", full error:", " (configured timeouts:"):
        text = text.split(rest)[0]
    return text[:300]


def all_of(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a filter that holds where every condition holds, one of them perhaps an ``$or``."""
    return {"$and": [dict(condition) for condition in conditions]}
