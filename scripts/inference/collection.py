"""Tags into a MongoDB collection: the sub-document that the daemon writes, fenced as there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit, urlunsplit

from common.errors import ConfigError
from common.progress import told_if_long
from common.urls import collection_of
from config.settings import CollectionSettings, FieldMap, StoreSettings
from fusion.infer.outputs import Bad, Earlier, Result
from king.store.client import StoreClient
from king.store.documents import dig, tagged_by
from king.store.store import Store


class CollectionSink:
    """A `fusion.infer.outputs.Sink` that is a collection.

    Writing the same results again changes nothing but their time. `insert` creates documents for
    posts that have none; posts tagged by `skip_bundle`, a name and version, under the same rules
    are not tagged again.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        insert: bool,
        skip_bundle: tuple[str, str] | None,
        rules: str | None = None,
    ) -> None:
        self._store = Store(StoreClient(settings))
        self._result_path = settings.result_path
        self._insert, self._skip_bundle, self._rules = insert, skip_bundle, rules

    def open(self, input_ids: Callable[[], Counter[str]]) -> None:
        with told_if_long(f"output {self._store.url}: no answer yet; waiting for it"):
            self._store.connect()

    def written(self, post_ids: Sequence[str]) -> Sequence[Earlier | None]:
        """See `fusion.infer.outputs.Sink`; a collection holds no scores of all classes."""
        if self._skip_bundle is None or not post_ids:
            return [None] * len(post_ids)
        tagged = {
            post_id
            for post_id, document in self._store.read_documents(post_ids).items()
            if tagged_by(document, self._result_path, self._skip_bundle)
            and dig(document, f"{self._result_path}.rules") == self._rules
        }
        return [Earlier() if post_id in tagged else None for post_id in post_ids]

    def finish(self) -> None:
        """Do nothing: every batch was safe when it was written."""

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Write results; return those whose post does not exist or that were refused.

        Where a post occurs several times among them, the last one is written.
        """
        if not results:
            return ()
        now = time.time()
        documents = {r.post_id: r.tagged.measured({}, attempts=1, ended_at=now) for r in results}
        reasons = self._store.write_results(documents, insert=self._insert)
        return [Bad(r.post_id, reasons[r.post_id]) for r in results if r.post_id in reasons]

    def close(self) -> None:
        self._store.close()


def store_of(url: str, settings: CollectionSettings) -> StoreSettings:
    """Return the database that ``mongodb://HOST/database.collection`` names."""
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
