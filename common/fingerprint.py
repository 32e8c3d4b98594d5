"""A feature's fingerprint: a digest that may know what it is of.

Where features do not fit, the settings that differ can then be named, and not only the digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=str)

FORMAT = 2
"""Raise it when the meaning of any feature changes in this code: all must be extracted again."""

_NAMED = 5
_SHOWN = 60


class Fingerprint(str):
    """A digest with the JSON values that it is of, where they are known; compares as its text."""

    parts: Mapping[str, Any]

    def __new__(cls, text: str, parts: Mapping[str, Any] | None = None) -> Fingerprint:
        made = super().__new__(cls, text)
        made.parts = dict(parts or {})
        return made


def digest(parts: Mapping[str, Any]) -> Fingerprint:
    """Return the hex digest of a mapping of JSON values, independent of the order of its keys."""
    values = {"format": FORMAT, **parts}
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    inner = {key: parts_of(value) or value for key, value in values.items()}
    return Fingerprint(
        hashlib.sha256(text.encode("ascii")).hexdigest()[:32], json.loads(json.dumps(inner))
    )


def parts_of(fingerprint: object) -> dict[str, Any]:
    """Return the parts of a fingerprint; empty when they are not known."""
    return dict(fingerprint.parts) if isinstance(fingerprint, Fingerprint) else {}


def with_parts(digests: Mapping[Name, str], parts: object) -> dict[Name, str]:
    """Return digests with their parts, as stored next to them; skip anything else."""
    known = parts if isinstance(parts, dict) else {}
    return {
        stream: Fingerprint(text, of_stream)
        if isinstance(of_stream := known.get(stream), dict) and of_stream
        else text
        for stream, text in digests.items()
    }


def known_parts(fingerprints: Mapping[Name, str]) -> dict[str, dict[str, Any]]:
    """Return the fingerprints with known parts, as `with_parts` takes them."""
    return {stream: parts for stream, text in fingerprints.items() if (parts := parts_of(text))}


def packed(fingerprints: Mapping[Name, str]) -> str:
    """Return fingerprints as one JSON text, which `unpacked` reads."""
    return json.dumps([dict(fingerprints), known_parts(fingerprints)])


def unpacked(text: str) -> dict[Any, str]:
    """Return the fingerprints in a JSON text: of `packed`, or plain digests by stream."""
    content = json.loads(text)
    digests, parts = content if isinstance(content, list) else (content, None)
    return with_parts(digests, parts)


def differing(needed: str, actual: str | None) -> str:
    """Return the end of a sentence on how two fingerprints differ; empty if not known."""
    ours, theirs = parts_of(needed), parts_of(actual)
    names = _differences(ours, theirs) if ours and theirs else []
    return f" (another {', '.join(names[:_NAMED])})" if names else ""


def mismatch(bundle: Mapping[Any, str], expected: Mapping[Any, str]) -> str | None:
    """Return the first stream that the bundle needs and the extractors do not give, in one line."""
    for stream, needed in bundle.items():
        actual = expected.get(stream)
        if actual != needed:
            named = actual or "nothing (its extractor is not enabled)"
            return (
                f"modality {stream}: the bundle needs {needed}, the extractors give "
                f"{named}{differing(needed, actual)}"
            )
    return None


def _differences(needed: Mapping[str, Any], actual: Mapping[str, Any], at: str = "") -> list[str]:
    names: list[str] = []
    for key in sorted({*needed, *actual}):
        one, other = needed.get(key), actual.get(key)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differences(one, other, f"{at}{key}.")
        elif any(isinstance(s, (dict, list)) or len(str(s)) > _SHOWN for s in (one, other)):
            names.append(f"{at}{key}")  # digests of weights tell a person nothing
        else:
            names.append(f"{at}{key}: {json.dumps(one)}, now {json.dumps(other)}")
    return names
