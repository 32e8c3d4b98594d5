"""Fingerprints: which architecture, weights and preprocessing a feature was made with.

No torch, so that the King can compare the workers' fingerprints with a bundle's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from common.fingerprint import Fingerprint, parts_of
from common.post import Stream
from config.settings import FeatureSettings

FORMAT = 1
"""Raise it when the meaning of any feature changes in this code: all must be extracted again."""

_OWN: tuple[Stream, ...] = ("video", "video_lstm", "image", "audio")
"""Streams of one extractor each; text and OCR share one."""


def digest(parts: Mapping[str, Any]) -> Fingerprint:
    """Return the hex digest of a mapping of JSON values, independent of the order of its keys."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True)
    inner = {key: parts_of(value) or value for key, value in {"format": FORMAT, **parts}.items()}
    values = json.loads(json.dumps(inner))
    return Fingerprint(hashlib.sha256(text.encode("ascii")).hexdigest()[:32], values)


def stream_fingerprints(
    features: FeatureSettings, by_extractor: Mapping[Stream, str]
) -> dict[Stream, str]:
    """Return the fingerprint of each stream, made of those of the extractors.

    ``ocr`` is embedded by the text extractor, so its fingerprint joins both; with ``ocr_mode:
    append`` what was read is part of ``text``, and there is no ``ocr``. With OCR disabled, text
    that a post brings along as already read is still embedded.

    Args:
        features: The settings that the extractors were made from.
        by_extractor: Those that are loaded, ``video_lstm`` as one of them; a stream whose
            extractors are not all there is left out.
    """
    result: dict[Stream, str] = {name: by_extractor[name] for name in _OWN if name in by_extractor}
    text = by_extractor.get("text")
    engine = by_extractor.get("ocr") if features.ocr.enabled else "disabled"
    if text is None:
        return result
    if features.ocr_mode == "append":
        if engine is not None:
            result["text"] = digest({"text": text, "ocr": engine, "mode": "append"})
        return result
    result["text"] = text
    if engine is not None:
        result["ocr"] = digest({"text": text, "ocr": engine, "mode": "separate"})
    return result
