"""What crosses between the King and its workers: frozen values, no torch, no cv2.

Pixels and patches lie in shared-memory slots and are named by `ArrayRef`; everything else
crosses as one of these messages, pickled, on one pipe per worker.

A task is answered by exactly one `Done` or `Failed`. Before a worker runs a batch it says which
tasks are in it (`Began`), so that the King knows whom a death may be charged to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from common.post import (
    MODALITIES,
    STREAMS,
    Failure,
    FeatureArray,
    Features,
    Media,
    MediaKind,
    Modality,
    Post,
    Status,
    Stream,
    Tag,
    Tags,
    modality_of,
)
from config.settings import ExtractorName
from extractors.parts import PartKind

__all__ = [
    "MODALITIES",
    "STREAMS",
    "ArrayRef",
    "Began",
    "BundleLoaded",
    "CacheFingerprints",
    "CacheHit",
    "CacheHits",
    "CacheLookup",
    "CacheQuery",
    "CacheUpdate",
    "DecodeTask",
    "Decoded",
    "Done",
    "Envelope",
    "Expect",
    "ExtractTask",
    "Extracted",
    "ExtractorName",
    "Failed",
    "Failure",
    "FeatureArray",
    "Features",
    "FetchTask",
    "Fetched",
    "FuseTask",
    "Media",
    "MediaKind",
    "Modality",
    "Part",
    "PartKind",
    "Post",
    "Ready",
    "Refused",
    "Reply",
    "Result",
    "Status",
    "Stop",
    "Stream",
    "Tag",
    "Tags",
    "Task",
    "WorkerRole",
    "modality_of",
]

WorkerRole: TypeAlias = Literal["fetch", "decode", "extract", "fuse", "cache"]


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """An array in a shared-memory slot.

    Attributes:
        slot: Index of the slot.
        offset: Bytes from the start of the slot, a multiple of 64.
    """

    slot: int
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """One array that was decoded from a media file; `extractors.parts` has its dtype and shape."""

    kind: PartKind
    ref: ArrayRef


@dataclass(frozen=True, slots=True)
class CacheQuery:
    """One media file that is looked up in the feature cache.

    Attributes:
        index: Of the file in its plan.
        wants: What of it would be extracted.
        sha256: Of its content, hex, where that is known; else it is looked up by its source.
        local: The source is a path, and the file may be read to learn its content.
    """

    index: int
    media: Media
    wants: tuple[PartKind, ...]
    sha256: str = ""
    local: bool = False


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """Look up what is known of a post, or of one file that has just been downloaded.

    Attributes:
        texts: Which of ``text`` and ``ocr`` are wanted.
        text: The post's own text.
        ocr: Text already read from the pictures, or None.
        mode: How the two are embedded.
        path: The downloaded file, which is kept meanwhile; "" where there is none.
    """

    media: tuple[CacheQuery, ...]
    texts: frozenset[Modality] = frozenset()
    text: str = ""
    ocr: str | None = None
    mode: Literal["append", "separate"] = "separate"
    path: str = ""


@dataclass(frozen=True, slots=True)
class FetchTask:
    """Download one media file into the spool folder."""

    media: Media


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Decode one local media file into a slot.

    Attributes:
        sha256: Of its content, hex, where what it gives is to be remembered.
    """

    kind: MediaKind
    path: str
    slot: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class ExtractTask:
    """Run one extractor on what one media file gave, or on a text.

    Attributes:
        extractor: ``ocr`` reads ``refs`` (pictures) into text; ``text`` embeds ``text``; the
            others turn ``refs`` into a feature array.
        modality: Which modality the result belongs to (``text`` serves ``text`` and ``ocr``).
        sha256: Of the media file's content, hex, where the result is to be remembered.
        kind: Of the media file.
    """

    extractor: ExtractorName
    modality: Modality
    refs: tuple[ArrayRef, ...] = ()
    text: str = ""
    sha256: str = ""
    kind: MediaKind | None = None


@dataclass(frozen=True, slots=True)
class FuseTask:
    """Predict the tags of one post from its features."""

    features: Features


Task: TypeAlias = CacheLookup | FetchTask | DecodeTask | ExtractTask | FuseTask


@dataclass(frozen=True, slots=True)
class CacheHit:
    """What the feature cache knows of one media file.

    Attributes:
        whole: Nothing of the file needs to be decoded.
        ready: What was asked for and need not be extracted: it is here, or the file has none.
        arrays: Stream ─► float16 ``(n, dim)``.
        text: What OCR read; None where that is not known.
        failure: Why the file cannot be decoded at all.
        failures: Modality ─► why that side of it cannot be.
    """

    index: int
    sha256: str
    whole: bool
    ready: frozenset[PartKind] = frozenset()
    arrays: Mapping[Stream, FeatureArray] = field(default_factory=dict)
    text: str | None = None
    failure: Failure | None = None
    failures: Mapping[Modality, Failure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheHits:
    """What the feature cache knows; a file that it does not know is left out.

    Attributes:
        texts: Text ─► its features, float16 ``(t, dim)``.
    """

    media: tuple[CacheHit, ...] = ()
    texts: Mapping[str, FeatureArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A media file in the spool folder; who gets it deletes it.

    Attributes:
        sha256: Of its content, hex, hashed as it came; empty where it was not.
    """

    path: str
    size_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a media file gave.

    Attributes:
        parts: In order of time.
        failures: Modality ─► why that side of the file is broken, while the rest is usable.
    """

    parts: tuple[Part, ...]
    failures: Mapping[Modality, Failure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Extracted:
    """An extractor's result: float16 ``(n, dim)``, or the text that OCR read.

    Attributes:
        array: Of the modality's own stream.
        also: Further streams of the modality, where ``array`` has rows.
    """

    array: FeatureArray | None = None
    text: str | None = None
    also: Mapping[Stream, FeatureArray] = field(default_factory=dict)


Result: TypeAlias = CacheHits | Fetched | Decoded | Extracted | Tags


@dataclass(frozen=True, slots=True)
class Envelope:
    """King ─► worker: one task.

    Attributes:
        deadline: `time.monotonic()` of this host, past which the result is of no use.
        solo: Run alone, never in a batch: the task is suspected of killing a worker.
    """

    task_id: int
    task: Task
    deadline: float
    solo: bool = False


@dataclass(frozen=True, slots=True)
class Expect:
    """King ─► fusion worker: the extractors' fingerprints, which every later bundle must match.

    Attributes:
        made_of: What they are of, where that is known; for errors.
    """

    fingerprints: Mapping[Stream, str]
    made_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheFingerprints:
    """King ─► cache worker: the fingerprint of each extractor, and of the video's LSTM."""

    fingerprints: Mapping[Stream, str]


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """King ─► cache worker: a URL led to this content, or this is what decoding it gave.

    Attributes:
        source: The URL; "" where the rest is about the content.
        parts: What it gave.
        failure: Why it gave nothing.
        failures: Modality ─► why that side of it is broken.
    """

    sha256: str
    source: str = ""
    kind: MediaKind = "image"
    parts: tuple[PartKind, ...] = ()
    failure: Failure | None = None
    failures: Mapping[Modality, Failure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stop:
    """King ─► worker: finish what has begun and exit 0."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker ─► King: models are loaded."""

    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Began:
    """Worker ─► King: these tasks now run, as one batch."""

    task_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Worker ─► King: a task's result."""

    task_id: int
    result: Result
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker ─► King: a task failed; the worker lives on."""

    task_id: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class BundleLoaded:
    """Fusion worker ─► King: the bundle now served; sent after `Ready` and after each swap."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Worker ─► King: it cannot start, and a restart would not help (a `ConfigError`)."""

    message: str


Reply: TypeAlias = Ready | Began | Done | Failed | BundleLoaded | Refused
