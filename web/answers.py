"""The answers: a post's tags as JSON, and the names of all classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import BundleError, ConfigError
from common.post import Tags
from common.result import TagResult, rounded
from config.labels import LabelMap
from workers.post_run import PostTags


class Labels:
    """The names of the classes of the bundle that is served."""

    def __init__(self, bundle: Path) -> None:
        self._file = bundle / "labels.json"
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str], LabelMap] | None = None

    def of(self, bundle: tuple[str, str]) -> LabelMap:
        """Return the names for a bundle's name and version; read again when it changes.

        Raises:
            BundleError: They cannot be read.
        """
        with self._lock:
            if self._known is None or self._known[0] != bundle:
                try:
                    self._known = (bundle, LabelMap.load(self._file))
                except ConfigError as error:
                    raise BundleError(str(error)) from error
            return self._known[1]


def tagged(
    ran: PostTags, *, labels: Labels | None = None, hide: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return the answer to ``POST /v1/tag``: the result's document, as `insighttag tag` prints it.

    Args:
        ran: A post whose features were fused.
        labels: Names of all classes; None leaves their scores out.
        hide: Replaces the server's own paths in a message.

    Raises:
        BundleError: The names cannot be read, or are not those of the model.
    """
    features, tags = ran.features, ran.tags
    failures = {
        modality: replace(failure, message=hide(failure.message))
        for modality, failure in features.failures.items()
    }
    result = TagResult.tagged(tags, features.statuses, failures).measured(ran.timings_ms)
    document = result.answer()
    if labels is not None:
        document["scores"] = _all_scores(tags, labels.of((tags.model, tags.version)))
    return document


def _all_scores(tags: Tags, labels: LabelMap) -> list[dict[str, Any]]:
    """Return every class with its score, the highest first."""
    if len(labels) != len(tags.scores):
        raise BundleError("labels.json does not belong to the bundle that is served")
    scores = [
        {"id": i, "name": name, "score": rounded(score)}
        for i, (name, score) in enumerate(zip(labels.names, tags.scores.tolist(), strict=True))
    ]
    return sorted(scores, key=lambda each: (-each["score"], each["id"]))
