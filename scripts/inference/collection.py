"""Tags into a MongoDB collection: the sub-document that the daemon writes, fenced as there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pymongo import UpdateOne

from common.errors import ConfigError
from common.post import Post
from config.infer import CollectionSettings, collection_of
from config.settings import FieldMap, StoreSettings
from fusion.infer.input import Bad
from fusion.infer.outputs import Result
from king.jobs import Started, Tagged
from king.store.claims import Claims
from king.store.documents import tagged_result


class CollectionSink(Claims):
    """See `fusion.infer.outputs.Sink`.

    Writing the same results again changes nothing but their time, so a run that was killed
    between a write and its note of it goes on without harm.

    Args:
        store: The database and its collection.
        insert: Make documents for posts that have none.
    """

    def __init__(self, store: StoreSettings, *, insert: bool) -> None:
        super().__init__(store)
        self._insert = insert

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Write results; gives those whose post is not there or that were refused.

        Where a post stands several times among them, the last one is written.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        if not results:
            return ()
        documents = self._documents([result.post_id for result in results])
        where = f"{self.settings.database}.{self.settings.collection}"
        kept: dict[str, Result] = {}
        reasons: dict[str, str] = {}
        for result in results:
            if self._insert or result.post_id in documents:
                kept[result.post_id] = result
            else:
                reasons[result.post_id] = f"{where} holds no such post"
        writes = [self._write_of(r, documents.get(post_id)) for post_id, r in kept.items()]
        _, refused = self.bulk(self.posts, writes)
        written = list(kept)
        reasons.update((written[i], reason) for i, (_, reason) in refused.items())
        return [Bad(r.post_id, reasons[r.post_id]) for r in results if r.post_id in reasons]

    def _write_of(self, result: Result, document: Mapping[str, Any] | None) -> UpdateOne:
        started = Started(Post(result.post_id), document["_id"] if document else None, attempt=1)
        content = tagged_result(
            Tagged(started, result.tags, result.statuses, result.failures, ended_at=time.time())
        )
        if document is not None:
            return self.write_tagged(started.document_id, content)
        change = {"$set": {self.settings.result_path: content}}
        return UpdateOne({self.settings.fields.id: result.post_id}, change, upsert=True)


def store_of(url: str, settings: CollectionSettings) -> StoreSettings:
    """The database that ``mongodb://…/database.collection`` names.

    Raises:
        ConfigError: The URL is none.
    """
    named = collection_of(url)
    if named is None:
        raise ConfigError("output: the URL must end in /database.collection")
    parts = urlsplit(url)
    return StoreSettings(
        # Users of a database may be known to it alone, which the path of the URL says.
        url=urlunsplit(parts._replace(path=f"/{named[0]}")),
        database=named[0],
        collection=named[1],
        fields=FieldMap(id=settings.id),
        result_path=settings.result_path,
        timeout_s=settings.timeout_s,
    )
