"""What is asked of the feature cache and what it answers; part of `workers.protocol`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from common.post import Failure, FeatureArray, Media, MediaKind, Modality, Stream

PartKind: TypeAlias = Literal["frames", "image", "patches", "picture"]


@dataclass(frozen=True, slots=True)
class Asked:
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
class RecallTask:
    """Look up what is known of a post, or of one file that has just been downloaded.

    Attributes:
        texts: Which of ``text`` and ``ocr`` are wanted.
        text: The post's own text.
        ocr: Text already read from the pictures, or None.
        mode: How the two are embedded.
        path: The downloaded file, which is kept meanwhile; "" where there is none.
    """

    media: tuple[Asked, ...]
    texts: frozenset[Modality] = frozenset()
    text: str = ""
    ocr: str | None = None
    mode: Literal["append", "separate"] = "separate"
    path: str = ""


@dataclass(frozen=True, slots=True)
class RecalledMedia:
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
class Recalled:
    """What the feature cache knows; a file that it does not know is left out.

    Attributes:
        texts: Text ─► its features, float16 ``(t, dim)``.
    """

    media: tuple[RecalledMedia, ...] = ()
    texts: Mapping[str, FeatureArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """King ─► cache worker: the fingerprint of each extractor, and of the video's LSTM."""

    fingerprints: Mapping[Stream, str]


@dataclass(frozen=True, slots=True)
class Remember:
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
