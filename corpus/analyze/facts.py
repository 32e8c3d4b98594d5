"""What is known of one media file, without its pixels and samples."""

from __future__ import annotations

from dataclasses import dataclass

from common.post import MediaKind


@dataclass(frozen=True, slots=True)
class MediaFact:
    """One media file as a post uses it.

    Attributes:
        sha256: Of its content, in hex; empty where there is no file.
        kind: What the posts use it as.
        size_bytes: Of the file.
        reason: Why it is broken or missing, a class of failures; None when it is fine.
        width: In pixels, as it is shown; 0 for sound.
        height: In pixels; 0 for sound.
        duration_s: Of video and sound; None where the file does not say.
        codec: Of the picture, the video stream, or a sound file's stream.
        sound: Codec of a video's sound; empty when it has none.
        look: What `corpus.analyze.looks.look_of` gave for a picture; None for what has none.
    """

    sha256: str
    kind: MediaKind
    size_bytes: int = 0
    reason: str | None = None
    width: int = 0
    height: int = 0
    duration_s: float | None = None
    codec: str = ""
    sound: str = ""
    look: bytes | None = None
