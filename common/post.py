"""The values that flow: one frozen value per stage, `Post` -> `Features` -> `Tags` -> `TagResult`.

The daemon and ``infer_net.py`` write a result's document into MongoDB, the HTTP server and
``insighttag tag`` answer with it, and ``infer_net.py`` writes it as a line of JSON. A new key is a
field of `TagResult`, its value in `TagResult.tagged`, and a line of `TagResult.document`: what lies
between here and the outputs passes the result on whole.

Nothing here imports torch or cv2, so that the King can use these values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import one_line

Modality: TypeAlias = Literal["video", "image", "audio", "text", "ocr", "asr"]
Stream: TypeAlias = Literal["video", "video_lstm", "image", "audio", "text", "ocr", "asr"]
"""One feature array of a modality; each modality has one of its own name."""
MediaKind: TypeAlias = Literal["image", "video", "audio"]
Status: TypeAlias = Literal["ok", "missing", "failed"]
OcrSource: TypeAlias = Literal["given", "read", "nothing_found", "off"]
"""Source of the text of a post's pictures: given, read by OCR, or the reason that there is none."""

MODALITIES: tuple[Modality, ...] = ("video", "image", "audio", "text", "ocr", "asr")
STREAMS: tuple[Stream, ...] = ("video", "video_lstm", "image", "audio", "text", "ocr", "asr")
TEXT_STREAMS: frozenset[Stream] = frozenset({"text", "ocr", "asr"})
"""Embedded by the text encoder: written, read in pictures, and heard."""
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")

FeatureArray: TypeAlias = npt.NDArray[np.float16]

# Scores are probabilities of float32 models: six digits are more than they mean, and half of the
# bytes that all of their digits would take in the database and in the logs of clients.
_SCORE_DIGITS = 6


def clean(text: str) -> str:
    """Replace what UTF-8 cannot encode: a lone surrogate would make the whole write fail."""
    return text.encode("utf-8", "replace").decode("utf-8")


def modality_of(stream: Stream) -> Modality:
    """Return the modality of a stream: it is missing or hidden as one."""
    return "video" if stream == "video_lstm" else stream


def streams_of(modalities: Iterable[Modality]) -> tuple[Stream, ...]:
    """Return every stream of some modalities, in the order of `STREAMS`."""
    chosen = frozenset(modalities)
    return tuple(stream for stream in STREAMS if modality_of(stream) in chosen)


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason of a failure: error class, one line for a person, and whether it may pass.

    The stage is ``message``, ``load``, ``fetch``, ``decode``, ``extract``, ``fuse`` or ``store``.
    """

    stage: str
    type: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, stage: str, error: BaseException, *, retryable: bool = False) -> Failure:
        """Describe an exception in one line."""
        text = one_line(error, 500)
        return cls(stage=stage, type=type(error).__name__, message=text, retryable=retryable)

    def as_dict(self) -> dict[str, str]:
        """Return the three keys that are stored and answered."""
        texts = {"stage": self.stage, "type": self.type, "message": self.message}
        return {key: clean(text) for key, text in texts.items()}


@dataclass(frozen=True, slots=True)
class Media:
    """One media file of a post: what the post says it is, and a URL or a local path."""

    kind: MediaKind
    source: str


@dataclass(frozen=True, slots=True)
class Post:
    """One item to tag.

    Attributes:
        ocr: Text already read from the pictures, or None when it is still to be read; a blank one
            is None too.
        labels: Names of the true tags, where they are known.
    """

    post_id: str
    text: str = ""
    media: tuple[Media, ...] = ()
    ocr: str | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Treat a blank ``ocr`` as none: many clients send every key, and OCR must not be off."""
        if self.ocr is not None and not self.ocr.strip():
            object.__setattr__(self, "ocr", None)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of one post.

    Attributes:
        arrays: float16 ``(n, dim)`` for each stream of the modalities that are ``ok``: in
            ``video`` a row for each frame, in ``video_lstm`` one for each video.
        statuses: ``ok``, ``missing`` or ``failed`` for every modality that is on.
        failures: The reason of each failed modality, and of media that failed inside an ok one.
        ocr_text: What was read in the pictures; None when nothing was read.
        ocr: Source of that text; None where it is not known, as in feature files.
    """

    post_id: str
    arrays: Mapping[Stream, FeatureArray]
    statuses: Mapping[Modality, Status]
    failures: Mapping[Modality, Failure] = field(default_factory=dict)
    ocr_text: str | None = None
    ocr: OcrSource | None = None


@dataclass(frozen=True, slots=True)
class Tag:
    """One predicted label with its score in [0, 1]; its ID may be the platform's own."""

    id: int | str
    name: str
    score: float


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A tag that the post does not get, with a score near its threshold."""

    id: int | str
    name: str
    score: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one post.

    Attributes:
        model: Name of the bundle.
        version: Version of the bundle; versions of one name sort as text, later is greater.
        tags: Those whose score reaches their threshold, highest first, after the rules of serving.
        scores: float64 ``(classes,)``, every class, in label order; no rule changes them.
        rules: Digest of the rules of serving, `config.tag_rules`; None without rules.
        near_misses: Tags that are not given, nearest to their threshold first.
        shadow: The tags of a bundle on trial, from the same features.
    """

    post_id: str
    model: str
    version: str
    tags: tuple[Tag, ...]
    scores: npt.NDArray[np.float64]
    rules: str | None = None
    near_misses: tuple[NearMiss, ...] = ()
    shadow: Tags | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagResult:
    """The tags of a post, or the reason why it has none.

    Attributes:
        model: Name of the bundle.
        version: Version of the bundle.
        rules: Digest of the rules of serving; None without rules.
        tags: Tags whose score reaches their threshold, highest first, after these rules.
        near_misses: Tags that are not given, nearest to their threshold first.
        modalities: ``ok``, ``missing`` or ``failed`` for each modality.
        failures: Reason of each failed modality.
        partial: One of them is retryable: another attempt may find more tags.
        ocr: ``given``, ``read``, ``nothing_found`` or ``off``; None where it is not known.
        error: Reason why the post failed; None when it is tagged.
        attempts: Number of the attempt that ended; None where attempts are not counted.
        tagged_at: End of the attempt; None in files, which must not depend on the clock.
        timings_ms: Milliseconds by stage; None where they are not measured.
        shadow: The result of a bundle on trial, which has a document of its own.
    """

    post_id: str
    model: str
    version: str
    rules: str | None = None
    status: Literal["tagged", "failed"] = "tagged"
    tags: tuple[Tag, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    modalities: Mapping[Modality, Status] = field(default_factory=dict)
    failures: Mapping[Modality, Failure] = field(default_factory=dict)
    partial: bool = False
    ocr: OcrSource | None = None
    error: Failure | None = None
    attempts: int | None = None
    tagged_at: datetime | None = None
    timings_ms: Mapping[str, int] | None = None
    shadow: TagResult | None = None

    @classmethod
    def tagged(cls, tags: Tags, features: Features) -> TagResult:
        """Return the result of a post that was tagged."""
        return cls(
            post_id=tags.post_id,
            model=tags.model,
            version=tags.version,
            rules=tags.rules,
            tags=tags.tags,
            near_misses=tags.near_misses,
            modalities=features.statuses,
            failures=features.failures,
            partial=any(failure.retryable for failure in features.failures.values()),
            ocr=features.ocr,
            shadow=cls.tagged(tags.shadow, features) if tags.shadow is not None else None,
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
        shadow = self.shadow
        if shadow is not None:
            shadow = shadow.measured(timings_ms, attempts=attempts, ended_at=ended_at)
        return replace(self, timings_ms=timings_ms, attempts=attempts, tagged_at=at, shadow=shadow)

    def document(self) -> dict[str, Any]:
        """Return the sub-document that MongoDB stores; keys that nobody measured are left out."""
        content: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "status": self.status,
            "tags": [
                {"id": tag.id, "name": tag.name, "score": rounded(tag.score)} for tag in self.tags
            ],
            "modalities": dict(self.modalities),
            "failures": {name: failure.as_dict() for name, failure in self.failures.items()},
            "error": self.error.as_dict() if self.error is not None else None,
        }
        if self.near_misses:
            content["near_misses"] = [
                {
                    "id": each.id,
                    "name": each.name,
                    "score": rounded(each.score),
                    "threshold": rounded(each.threshold),
                }
                for each in self.near_misses
            ]
        if self.rules is not None:
            content["rules"] = self.rules
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
