"""The documents of a collection in the order of ``_id``, a page at a time, from any position on.

Two ways. By ranges (``_id`` above the last one), a type of ``_id`` after the other, because a
range holds one type only. And, for servers that only speak like MongoDB (the embedded one orders
IDs as text and finds none by the type ``objectId``), through one cursor: there, going on means
reading past what was read before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import bson
import structlog

from common.errors import ConfigError, RetryableError, StoreUnavailable
from common.progress import told_if_long
from common.urls import redact
from config.settings import StoreSettings

if TYPE_CHECKING:  # pymongo takes a fifth of a second, which --help need not wait for
    from king.store.client import StoreClient


@dataclass(frozen=True, slots=True)
class Position:
    """The last ``_id`` that was read, and the number of its type in `_BRACKETS`."""

    bracket: int = 0
    last: Any = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some documents, and the position after them."""

    documents: tuple[Mapping[str, Any], ...]
    position: Position


T = TypeVar("T")

# The types that an _id can have. An unfinished pull has recorded a number of this list.
_BRACKETS = (
    *("null", "number", "string", "object", "binData", "objectId", "bool", "date"),
    *("timestamp", "minKey", "javascript", "maxKey"),
)
# BadValue, FailedToParse, TypeMismatch, a broken regular expression: what was asked is wrong.
_MISTAKES = frozenset((2, 9, 14, 51091))
_BATCH = 1000
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 32.0  # about a minute in all

_STEP_S = 0.1  # how late a signal is noticed

log = structlog.get_logger()


class Interrupted(Exception):
    """A signal came."""


class Pages:
    """A reader of the posts collection, `size` documents a page; it knows how the server reads."""

    def __init__(
        self,
        settings: StoreSettings,
        query: Mapping[str, Any],
        fields: Mapping[str, int],
        size: int,
        *,
        by_range: bool | None = None,
        stopped: Callable[[], object] = lambda: None,
    ) -> None:
        """Read nothing yet; ``stopped`` is asked while the database is waited for."""
        from king.store.client import StoreClient

        self._client: StoreClient = StoreClient(settings)
        self._stopped = stopped
        waits_s = [_FIRST_WAIT_S]
        while waits_s[-1] < _LONGEST_WAIT_S:
            waits_s.append(waits_s[-1] * 2)
        longest_s = sum(waits_s) + (len(waits_s) + 1) * settings.timeout_s
        self._patience = (
            f"database {redact(settings.url)}: no answer yet; waiting for it, at most "
            f"{longest_s:.0f} s"
        )
        self._query, self._fields, self._size = dict(query), dict(fields), size
        self._by_range = by_range
        self._wait_s = _FIRST_WAIT_S

    def close(self) -> None:
        self._client.close()

    def count(self) -> int:
        return self._patiently(lambda: int(self._client.posts.count_documents(self._query)))

    def pages(self, after: Position) -> Iterator[Page]:
        """Yield the pages after a position; wait for a database that is away for a while."""
        if self._by_range is None:
            self._by_range = self._patiently(lambda: not self._client.is_embedded)
        yield from self._ranges(after) if self._by_range else self._listed(after)

    def _ranges(self, position: Position) -> Iterator[Page]:
        for bracket in range(position.bracket, len(_BRACKETS)):
            last = position.last if bracket == position.bracket else None
            while True:
                bounds: dict[str, Any] = {"$gt": last}
                if last is None:
                    bounds = {"$type": _BRACKETS[bracket]}
                elif not isinstance(last, str) and str(last).lower() == "nan":
                    # It is the first of the numbers, and no number is greater than it.
                    bounds = {"$gte": float("-inf")}
                documents = self._patiently(partial(self._read, bounds))
                if not documents:
                    break
                last = documents[-1]["_id"]
                yield Page(tuple(documents), Position(bracket, last))
                if len(documents) < self._size or last is None:
                    break

    def _read(self, bounds: Mapping[str, Any]) -> list[dict[str, Any]]:
        from king.store.client import all_of

        condition = all_of({"_id": bounds}, self._query)
        cursor = self._client.posts.find(condition, self._fields).sort("_id", 1)
        return list(cursor.limit(self._size))

    def _listed(self, position: Position) -> Iterator[Page]:
        last = position.last
        while True:
            try:
                for chunk in self._chunks(last):
                    last = chunk[-1]["_id"]
                    yield Page(tuple(chunk), Position(0, last))
                    self._wait_s = _FIRST_WAIT_S
                return
            except StoreUnavailable as error:  # from where it was, through a new cursor
                self._wait(error)

    def _chunks(self, after: Any) -> Iterator[list[dict[str, Any]]]:
        """Yield the documents after the one with this ``_id``."""
        documents = self._all()
        target = None if after is None else _key(after)
        if target is not None and not any(_key(each["_id"]) == target for each in documents):
            raise RetryableError(
                f"the post at which the pull stopped (_id {after}) is gone: add --restart"
            )
        while chunk := list(islice(documents, self._size)):
            yield chunk

    def _all(self) -> Iterator[dict[str, Any]]:
        with self._client.edge():
            yield from (
                self._client.posts.find(self._query, self._fields).sort("_id", 1).batch_size(_BATCH)
            )

    def _patiently(self, read: Callable[[], T]) -> T:
        while True:
            try:
                with told_if_long(self._patience), self._client.edge():
                    value = read()
            except StoreUnavailable as error:
                self._wait(error)
            else:
                self._wait_s = _FIRST_WAIT_S
                return value

    def _wait(self, error: StoreUnavailable) -> None:
        """Wait, longer each time; raise the error when that was long enough."""
        from pymongo.errors import OperationFailure

        cause = error.__cause__
        if isinstance(cause, OperationFailure) and cause.code in _MISTAKES:
            raise ConfigError(f"--query: {error}") from error
        if self._wait_s > _LONGEST_WAIT_S:
            raise error
        log.warning("pull.waiting", wait_s=self._wait_s, error=str(error))
        due = time.monotonic() + self._wait_s
        while (left_s := due - time.monotonic()) > 0:
            if self._stopped():
                raise Interrupted
            time.sleep(min(left_s, _STEP_S))
        self._wait_s *= 2


def _key(value: Any) -> bytes:
    """Return an ``_id`` of any type as bytes that can be compared."""
    return bson.encode({"": value})
