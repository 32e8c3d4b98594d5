"""Keys: a digest of everything that determines an entry.

An extractor's fingerprint holds architecture, weights, preprocessing and the sampling that its own
section of the settings names. What else changes a result stands here: limits that cut a file
short, and settings of one section that another extractor's input depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common.post import MEDIA_KINDS, STREAMS, MediaKind, Stream
from config.settings import Settings
from extractors.parts import slot_bytes

FORMAT = 1
"""Raise it when the meaning of entries changes: older ones are then never found."""

_DECODERS = ("av", "opencv-python", "opencv-python-headless")


class Keys:
    """Keys of entries under some settings; 64 hex digits each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._video_limits = {"max_duration_s": settings.decode.max_duration_s}
        self._sound_limits = {**self._video_limits, "max_audio_s": settings.decode.max_audio_s}
        # A post has a dozen keys, of which only contents and fingerprints differ.
        self._private = _text_of(settings.fetch.allow_private_hosts)
        self._precision = _text_of(settings.features.text.precision)
        self._parts = {kind: _text_of(self._parts_of(kind)) for kind in MEDIA_KINDS}
        self._inputs = {
            (kind, stream): _text_of(self._input_of(kind, stream))
            for kind in MEDIA_KINDS
            for stream in STREAMS
        }

    def source(self, url: str) -> str:
        """Return the key of the content that a URL leads to, apart for daemons with other hosts."""
        return _key("source", url, self._private)

    def media(self, sha256: str, kind: MediaKind) -> str:
        """Return the key of the outcome of decoding a file."""
        return _key("parts", sha256, kind, self._parts[kind])

    def stream(self, sha256: str, kind: MediaKind, stream: Stream, fingerprint: str) -> str:
        """Return the key of a media file's features; for ``ocr``, of the text read in it."""
        how = self._inputs[kind, stream]
        return _key("features", sha256, kind, stream, fingerprint, how)

    def text(self, text: str, fingerprint: str) -> str:
        """Return the key of a text's features, whether written or read."""
        return _key("text", text, fingerprint, self._precision)

    @cached_property
    def limits(self) -> str:
        """Return a digest of what, apart from its content, makes a file fail.

        Inside the entry and not in its key: only files that failed are decoded again when a limit
        or a decoder's version changes.
        """
        decode = self._settings.decode
        return _key(
            _text_of(
                decode.max_pixels,
                decode.memory_mb,
                slot_bytes(self._settings),
                {name: _version(name) for name in _DECODERS},
            )
        )

    def _parts_of(self, kind: MediaKind) -> Mapping[str, Any]:
        """Return the settings that decide which parts a file gives."""
        features = self._settings.features
        if kind == "audio":
            return self._sound_limits
        if kind == "image":
            return {"ocr": features.ocr.enabled, "max_frames": features.image.max_frames}
        return {
            **self._sound_limits,
            "ocr": features.ocr.enabled and features.ocr.frames > 0,
            "frames": features.video.frames,
            "decode": features.video.decode,
        }

    def _input_of(self, kind: MediaKind, stream: Stream) -> Mapping[str, Any]:
        """Return the settings that decide an extractor's input, apart from its fingerprint."""
        features = self._settings.features
        if stream == "image":
            return {"precision": features.image.precision}
        if stream == "audio":
            return {**self._sound_limits, "precision": features.audio.precision}
        if stream == "ocr" and kind == "image":
            return {"max_frames": features.image.max_frames}
        if stream == "ocr":
            video = features.video
            return {**self._video_limits, "frames": video.frames, "decode": video.decode}
        return {**self._video_limits, "precision": features.video.precision}


def _key(*parts: str) -> str:
    """Digest of texts; each with its length, so that no two lists of them are the same bytes."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        total.update(b"%d:" % len(content))
        total.update(content)
    return total.hexdigest()


def _text_of(*values: Any) -> str:
    """Return settings as text; the same for the same values."""
    return json.dumps([FORMAT, *values], sort_keys=True, ensure_ascii=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
