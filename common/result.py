"""The result of one post, and the one builder of the document that is written for it.

The daemon and ``infer_net.py`` write the document into MongoDB, the HTTP server and
``insighttag tag`` answer with it, and ``infer_net.py`` writes it as a line of JSON. A new key is a
field of `TagResult`, its value in `TagResult.tagged`, and a line of `TagResult.document`: what lies
between here and the outputs passes the result on whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

from common.post import Failure, Features, Modality, OcrSource, Status, Tag, Tags

# Scores are probabilities of float32 models: six digits are more than they mean, and half of the
# bytes that all of their digits would take in the database and in the logs of clients.
_SCORE_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class TagResult:
    """The tags of a post, or the reason why it has none.

    Attributes:
        model: Name of the bundle.
        version: Version of the bundle.
        tags: Tags whose score reaches their threshold, highest first.
        modalities: ``ok``, ``missing`` or ``failed`` for each modality.
        failures: Reason of each failed modality.
        partial: One of them is retryable: another attempt may find more tags.
        ocr: ``given``, ``read``, ``nothing_found`` or ``off``; None where it is not known.
        error: Reason why the post failed; None when it is tagged.
        attempts: Number of the attempt that ended; None where attempts are not counted.
        tagged_at: End of the attempt; None in files, which must not depend on the clock.
        timings_ms: Milliseconds by stage; None where they are not measured.
    """

    post_id: str
    model: str
    version: str
    status: Literal["tagged", "failed"] = "tagged"
    tags: tuple[Tag, ...] = ()
    modalities: Mapping[Modality, Status] = field(default_factory=dict)
    failures: Mapping[Modality, Failure] = field(default_factory=dict)
    partial: bool = False
    ocr: OcrSource | None = None
    error: Failure | None = None
    attempts: int | None = None
    tagged_at: datetime | None = None
    timings_ms: Mapping[str, int] | None = None

    @classmethod
    def tagged(cls, tags: Tags, features: Features) -> TagResult:
        """Return the result of a post that was tagged."""
        return cls(
            post_id=tags.post_id,
            model=tags.model,
            version=tags.version,
            tags=tags.tags,
            modalities=features.statuses,
            failures=features.failures,
            partial=any(failure.retryable for failure in features.failures.values()),
            ocr=features.ocr,
        )

    @classmethod
    def failed(cls, post_id: str, bundle: tuple[str, str], error: Failure) -> TagResult:
        """Return the result of a post that could not be tagged."""
        model, version = bundle
        return cls(post_id=post_id, model=model, version=version, status="failed", error=error)

    def measured(
        self,
        timings_ms: Mapping[str, int],
        *,
        attempts: int | None = None,
        ended_at: float | None = None,
    ) -> TagResult:
        """Return the result with its times; `ended_at` is in seconds since the epoch."""
        at = datetime.fromtimestamp(ended_at, timezone.utc) if ended_at is not None else None
        return replace(self, timings_ms=timings_ms, attempts=attempts, tagged_at=at)

    def document(self) -> dict[str, Any]:
        """Return the sub-document that MongoDB stores; keys that nobody measured are left out."""
        content: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "status": self.status,
            "tags": [
                {"id": int(tag.id), "name": tag.name, "score": rounded(tag.score)}
                for tag in self.tags
            ],
            "modalities": dict(self.modalities),
            "failures": {name: failure.as_dict() for name, failure in self.failures.items()},
            "error": self.error.as_dict() if self.error is not None else None,
        }
        if self.partial:
            content["partial"] = True
        if self.ocr is not None:
            content["ocr"] = self.ocr
        if self.attempts is not None:
            content["attempts"] = self.attempts
        if self.tagged_at is not None:
            content["tagged_at"] = self.tagged_at
        if self.timings_ms is not None:
            content["timings_ms"] = dict(self.timings_ms)
        return content

    def answer(self) -> dict[str, Any]:
        """Return the document with the post's ID in front, for every output but the database."""
        return {"post_id": self.post_id, **self.document()}


def rounded(score: float) -> float:
    """Return a score as it is shown and stored."""
    return round(float(score), _SCORE_DIGITS)
