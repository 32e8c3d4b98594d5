"""Tags into a MongoDB collection: the sub-document that the daemon writes, fenced as there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from common.errors import ConfigError
from common.result import TagResult
from config.infer import CollectionSettings, collection_of
from config.settings import FieldMap, StoreSettings
from fusion.infer.input import Bad
from fusion.infer.outputs import Result
from king.store.client import StoreClient
from king.store.store import Store


class CollectionSink:
    """Writes results into the collection; see `fusion.infer.outputs.Sink`.

    Writing the same results again changes nothing but their time, so a run that was killed
    between a write and its note of it continues without harm.

    Args:
        settings: Database and collection.
        insert: Create documents for posts that have none.
    """

    def __init__(self, settings: StoreSettings, *, insert: bool) -> None:
        self._store = Store(StoreClient(settings))
        self._insert = insert

    def connect(self) -> None:
        """Reach the database.

        Raises:
            StoreUnavailable: It cannot be reached.
            ConfigError: It refuses the user or the password.
        """
        self._store.connect()

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Write results; return those whose post does not exist or that were refused.

        Where a post occurs several times among them, the last one is written.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        if not results:
            return ()
        now = time.time()
        documents = {
            r.post_id: TagResult.tagged(r.tags, r.statuses, r.failures).measured(
                {}, attempts=1, ended_at=now
            )
            for r in results
        }
        reasons = self._store.write_results(documents, insert=self._insert)
        return [Bad(r.post_id, reasons[r.post_id]) for r in results if r.post_id in reasons]

    def close(self) -> None:
        """Close the connections."""
        self._store.close()


def store_of(url: str, settings: CollectionSettings) -> StoreSettings:
    """Return the database that ``mongodb://HOST/database.collection`` names.

    Raises:
        ConfigError: The URL names no collection.
    """
    named = collection_of(url)
    if named is None:
        raise ConfigError("output: the URL must end in /database.collection")
    parts = urlsplit(url)
    return StoreSettings(
        # A user may be known to one database only; the path of the URL names it.
        url=urlunsplit(parts._replace(path=f"/{named[0]}")),
        database=named[0],
        collection=named[1],
        fields=FieldMap(id=settings.id),
        result_path=settings.result_path,
        timeout_s=settings.timeout_s,
    )
