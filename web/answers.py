"""What is answered: a post's tags as JSON, and the names of all classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import BundleError, ConfigError
from config.labels import LabelMap
from workers.protocol import Tags
from workers.runner import Ran

_STAGES = ("recall", "fetch", "decode", "extract", "fuse", "total")


class Labels:
    """The names of the classes of the bundle that is served."""

    def __init__(self, bundle: Path) -> None:
        self._file = bundle / "labels.json"
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str], LabelMap] | None = None

    def of(self, bundle: tuple[str, str]) -> LabelMap:
        """The names for a bundle's name and version; read anew when it changes.

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
    ran: Ran, *, labels: Labels | None = None, hide: Callable[[str], str] = str
) -> dict[str, Any]:
    """The answer to ``POST /v1/tag``.

    Args:
        ran: What became of the post.
        labels: Where the names of all classes are; None leaves their scores out.
        hide: Takes what is nobody's business out of a message.

    Raises:
        BundleError: The names cannot be read, or are not those of the model.
    """
    features, tags = ran.features, ran.tags
    if tags is None:
        raise BundleError("there is no fusion")
    document: dict[str, Any] = {
        "post_id": tags.post_id,
        "model": tags.model,
        "version": tags.version,
        "tags": [{"id": int(t.id), "name": t.name, "score": _score(t.score)} for t in tags.tags],
        "modalities": dict(features.statuses),
        "failures": {
            modality: {key: hide(text) for key, text in failure.as_dict().items()}
            for modality, failure in features.failures.items()
        },
        "timings_ms": {s: ran.timings_ms[s] for s in _STAGES if s in ran.timings_ms},
    }
    if labels is not None:
        document["scores"] = _all_scores(tags, labels.of((tags.model, tags.version)))
    return document


def _all_scores(tags: Tags, labels: LabelMap) -> list[dict[str, Any]]:
    """Every class with its score, the highest first."""
    if len(labels) != len(tags.scores):
        raise BundleError("labels.json is not that of the bundle that is served")
    found = [
        {"id": i, "name": name, "score": _score(score)}
        for i, (name, score) in enumerate(zip(labels.names, tags.scores.tolist(), strict=True))
    ]
    return sorted(found, key=lambda each: (-each["score"], each["id"]))


def _score(score: float) -> float:
    return round(float(score), 6)
