"""What a body is wrapped in by kombu's publishers: Redis envelopes and compression.

A body is taken out where the wrapping is understood, and left as it came where it is not:
`king.messages` then refuses it with a reason, and nothing is lost on the way there.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import json
import lzma
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_BODY_BYTES = 1 << 20

# Kombu's names of compressions ─► a decompressor with max_length, so that a bomb stays small.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": lambda: zlib.decompressobj(wbits=47),  # zlib's own header or gzip's
    "gzip": lambda: zlib.decompressobj(wbits=47),
    "zlib": lambda: zlib.decompressobj(wbits=47),
    "application/x-bz2": bz2.BZ2Decompressor,
    "bzip2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
    "lzma": lzma.LZMADecompressor,
    "xz": lzma.LZMADecompressor,
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """An item of a Redis list.

    Attributes:
        body: What the publisher sent; still compressed where `compression` says so.
        compression: Kombu's name of it, or None.
        redelivered: Whether it was delivered before.
    """

    body: bytes
    compression: str | None = None
    redelivered: bool = False


def read_item(item: bytes) -> Envelope:
    """Read an item of a Redis list: a kombu envelope, or anything else as a bare body."""
    content = _kombu_envelope(item)
    if content is None:
        return Envelope(item)
    headers = content.get("headers")
    headers = headers if isinstance(headers, dict) else {}
    body = _body_of(content)
    compression = headers.get("compression")
    return Envelope(
        body=item if body is None else body,
        compression=compression if isinstance(compression, str) and body is not None else None,
        redelivered=headers.get("redelivered") is True,
    )


def redelivery_of(item: bytes, queue: str, priority: int) -> bytes:
    """The item, marked as delivered before, in an envelope that kombu's consumers read too."""
    content = _kombu_envelope(item)
    if content is None or _body_of(content) is None:  # delivered as a bare body
        content = {
            "body": base64.b64encode(item).decode(),
            "content-type": "application/octet-stream",
            "content-encoding": "binary",
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": uuid.uuid4().hex,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_mode": 2,
                "priority": priority,
            },
        }
    headers = content.get("headers")
    content["headers"] = {**(headers if isinstance(headers, dict) else {}), "redelivered": True}
    return json.dumps(content).encode()


def decompressed(body: bytes, compression: str | None) -> bytes:
    """Undo kombu's compression; as it came when that fails or gives over 1 MiB."""
    make = _DECOMPRESSORS.get((compression or "").lower())
    if make is None:
        return body
    try:
        decompressor = make()
        plain: bytes = decompressor.decompress(body, MAX_BODY_BYTES)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError):
        return body
    return plain if decompressor.eof else body  # truncated, or more than MAX_BODY_BYTES


def _kombu_envelope(item: bytes) -> dict[str, Any] | None:
    if not item.startswith(b"{"):
        return None
    try:
        content = json.loads(item)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "body" not in content:
        return None
    return content if isinstance(content.get("properties"), dict) else None


def _body_of(content: dict[str, Any]) -> bytes | None:
    """The body's bytes; None where the envelope does not hold what it says."""
    body = content["body"]
    if not isinstance(body, str):
        return None
    encoding = content["properties"].get("body_encoding")
    if isinstance(encoding, str) and encoding.lower() == "base64":
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            return None
    return body.encode("utf-8", "surrogatepass")
