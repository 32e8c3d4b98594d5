"""The queue message: a post to tag. Any client can publish one.

Accepted bodies, all UTF-8: ``{"post_id": "p1", "priority": 3, "force": true}``, a JSON string or
number, or the bare ID as text. A number is read as its digits, so that ``42`` and ``"42"`` name
the same post. Kombu's publishers may have compressed the body.
"""

from __future__ import annotations

import bz2
import json
import lzma
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from common.errors import MessageError, one_line

# MongoDB indexes keys up to 1 KiB in its older versions; at double, a post whose ID is longer than
# half of that could be published but not looked up there. Real IDs are under 100 bytes.
MAX_ID_BYTES = 512

# Room for an ID and for keys of newer publishers that we ignore. A message without a limit would
# sit in memory `prefetch` times; at half or double nothing changes for real messages.
MAX_BODY_BYTES = 64 * 1024

# A compressed body may grow to this size; beyond it, it is a bomb and stays packed. More than
# MAX_BODY_BYTES, so that a body that is merely too long is refused for its length.
MAX_PLAIN_BYTES = 1 << 20

# AMQP's own range, and the range of the lists that kombu makes in Redis.
MIN_PRIORITY, MAX_PRIORITY = 0, 9

# A header of 13 bytes may ask for a dictionary of 4 GiB. xz's highest preset needs 65 MiB.
_LZMA_BYTES = 128 * 2**20


# Kombu's name of a compression -> a decompressor with max_length, so that a bomb stays small.
# wbits=47 reads zlib's own header or gzip's.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": lambda: zlib.decompressobj(wbits=47),
    "gzip": lambda: zlib.decompressobj(wbits=47),
    "zlib": lambda: zlib.decompressobj(wbits=47),
    "application/x-bz2": bz2.BZ2Decompressor,
    "bzip2": bz2.BZ2Decompressor,
    "application/x-lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES),
    "lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES),
    "xz": lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES),
}


@dataclass(frozen=True, slots=True)
class PostMessage:
    """One post to tag, sooner with a higher priority (0 to 9).

    With ``force`` it is tagged again even when this bundle has tagged it already.
    """

    post_id: str
    priority: int = 0
    force: bool = False

    def encode(self) -> bytes:
        """Return the JSON body, UTF-8; defaults are left out."""
        content: dict[str, object] = {"post_id": self.post_id}
        if self.priority:
            content["priority"] = self.priority
        if self.force:
            content["force"] = True
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def decompressed(body: bytes, headers: object) -> bytes:
    """Undo the compression that a message's ``compression`` header names.

    The body is returned as it is when it cannot be unpacked or would exceed MAX_PLAIN_BYTES.
    """
    name = headers.get("compression") if isinstance(headers, dict) else None
    make = _DECOMPRESSORS.get(name.lower()) if isinstance(name, str) else None
    if make is None:
        return body
    try:
        decompressor = make()
        plain: bytes = decompressor.decompress(body, MAX_PLAIN_BYTES)
    except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError):
        return body
    return plain if decompressor.eof else body  # cut short, or more than the limit


def parse_message(body: bytes | str) -> PostMessage:
    """Read a message's body; MessageError says in one line why it cannot be read.

    Unknown keys are ignored: a newer publisher may send more than this reader knows.
    """
    text = _text(body).strip()
    if not text:
        raise MessageError("the message is empty")
    if text[0] not in '{["' and text not in _NAMELESS:
        return PostMessage(post_id=_checked_id(text))
    try:
        # parse_float keeps the digits; parse_constant refuses NaN and Infinity.
        content = json.loads(text, parse_float=_Digits, parse_int=_Digits, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the message is not JSON: {one_line(error, 200)}") from error
    if isinstance(content, dict):
        return _from_object(content)
    return PostMessage(post_id=_id_of(content))


# JSON that begins like a bare ID but names no post.
_NAMELESS = {"null", "true", "false"}


class _Digits(str):
    """A JSON number as it was written."""

    __slots__ = ()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _text(body: bytes | str) -> str:
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")  # lone surrogates then fail to decode
    if len(body) > MAX_BODY_BYTES:
        raise MessageError(f"the message has {len(body)} bytes; at most {MAX_BODY_BYTES} are read")
    try:
        # "utf-8-sig" would read its module from disk at the first message, which a King that is
        # out of descriptors cannot.
        return body.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MessageError(f"the message is not UTF-8 (byte {error.start})") from error


def _from_object(content: dict[str, object]) -> PostMessage:
    if "post_id" not in content:
        raise MessageError('the message has no "post_id"')
    return PostMessage(
        post_id=_id_of(content["post_id"]),
        priority=_priority(content.get("priority")),
        force=_force(content.get("force")),
    )


def _id_of(value: object) -> str:
    if not isinstance(value, str):  # numbers are _Digits
        raise MessageError(f"the post_id is {_kind(value)}, not text or a number")
    return _checked_id(value.strip())


def _checked_id(text: str) -> str:
    if not text:
        raise MessageError("the post_id is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise MessageError("the post_id has half a character (a lone surrogate)") from error
    if size > MAX_ID_BYTES:
        raise MessageError(f"the post_id has {size} bytes; at most {MAX_ID_BYTES} are allowed")
    control = next((c for c in text if unicodedata.category(c) == "Cc"), None)
    if control is not None:
        raise MessageError(f"the post_id has the control character U+{ord(control):04X}")
    return str(text)


def _priority(value: object) -> int:
    if value is None:
        return MIN_PRIORITY
    if isinstance(value, _Digits) and value.lstrip("-").isdigit() and len(value) <= 20:
        return min(max(int(value), MIN_PRIORITY), MAX_PRIORITY)
    raise MessageError('the "priority" is not a whole number')


def _force(value: object) -> bool:
    if value is None:
        return False
    if isinstance(value, bool):
        return value
    raise MessageError('"force" is neither true nor false')


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
