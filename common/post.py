"""The values that flow: one frozen value per stage, `Post` -> `Features` -> `Tags`.

Nothing here imports torch or cv2, so that the King can use these values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import one_line

Modality: TypeAlias = Literal["video", "image", "audio", "text", "ocr"]
Stream: TypeAlias = Literal["video", "video_lstm", "image", "audio", "text", "ocr"]
"""One feature array of a modality; each modality has one of its own name."""
MediaKind: TypeAlias = Literal["image", "video", "audio"]
Status: TypeAlias = Literal["ok", "missing", "failed"]
OcrSource: TypeAlias = Literal["given", "read", "nothing_found", "off"]
"""Source of the text of a post's pictures: given, read by OCR, or the reason that there is none."""

MODALITIES: tuple[Modality, ...] = ("video", "image", "audio", "text", "ocr")
STREAMS: tuple[Stream, ...] = ("video", "video_lstm", "image", "audio", "text", "ocr")
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio")

FeatureArray: TypeAlias = npt.NDArray[np.float16]


def clean(text: str) -> str:
    """Replace what UTF-8 cannot hold: a lone surrogate would make the whole write fail."""
    return text.encode("utf-8", "replace").decode("utf-8")


def modality_of(stream: Stream) -> Modality:
    """Return the modality of a stream: it is missing or hidden as one."""
    return "video" if stream == "video_lstm" else stream


def streams_of(modalities: Iterable[Modality]) -> tuple[Stream, ...]:
    """Return every stream of some modalities, in the order of `STREAMS`."""
    wanted = frozenset(modalities)
    return tuple(stream for stream in STREAMS if modality_of(stream) in wanted)


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
        """Take a blank ``ocr`` for none: many clients send every key, and OCR must not be off."""
        if self.ocr is not None and not self.ocr.strip():
            object.__setattr__(self, "ocr", None)


@dataclass(frozen=True, slots=True)
class Features:
    """Features of one post.

    Attributes:
        arrays: float16 ``(n, dim)`` for each stream of the modalities that are ``ok``: in
            ``video`` a row for each frame, in ``video_lstm`` one for each video.
        statuses: ``ok``, ``missing`` or ``failed`` for every modality.
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
    """One predicted label with its score in [0, 1]."""

    id: int
    name: str
    score: float


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one post.

    Attributes:
        model: Name of the bundle.
        version: Version of the bundle; versions of one name sort as text, later is greater.
        tags: Those whose score reaches their threshold, highest first.
        scores: float64 ``(classes,)``, every class, in label order.
    """

    post_id: str
    model: str
    version: str
    tags: tuple[Tag, ...]
    scores: npt.NDArray[np.float64]
