"""The body of an answer without its content encoding.

Downloads ask for ``identity``, but servers pack files unasked, store the label of an upload
(``aws-chunked``), and write there what is no packing at all (``utf-8``, ``none``). So the label
is looked at only where the body does not begin as media.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain

from common.errors import FetchRefused, FetchRetryable
from extractors.media.sniff import HEAD_BYTES, sniff

STEP_BYTES = 1 << 16
"""Most bytes of one step, also of a bomb's. Smaller ones cost time in Python, larger ones memory on
each of the connections."""

_PLAIN = frozenset({"", "identity", "none", "utf-8", "aws-chunked"})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP = b"\x1f\x8b\x08"


def is_media(head: bytes) -> bool:
    """Return True for the first bytes of a media file."""
    file_type = sniff(head)
    return file_type is not None and bool(file_type.kinds)


def unpacked(chunks: Iterator[bytes], label: str) -> Iterator[bytes]:
    """Yield a body in steps of bounded size, without the encoding that its label names.

    A step may be empty, so that the reader can check its deadline after each.

    Args:
        chunks: The body as it was sent.
        label: The header Content-Encoding.

    Raises:
        FetchRefused: It is packed in a way that cannot be undone, or damaged.
        FetchRetryable: It ends too early.
    """
    head = bytearray()
    while len(head) < HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    body = chain([bytes(head)], chunks)
    names = [name for each in label.lower().split(",") if (name := each.strip()) not in _PLAIN]
    if not names or not head or is_media(bytes(head)):
        yield from body
    elif len(names) == 1 and names[0] in _DEFLATED:
        yield from _inflated(body, names[0])
    else:
        raise FetchRefused(f"content encoding {', '.join(names)[:40]!r} cannot be unpacked here")


def _inflated(body: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of all gzip members, or of one deflated stream; the first chunk is long."""
    broken = FetchRefused(f"content encoding {name}: the body is broken")
    rest = next(body)
    unpacker = zlib.decompressobj(_window_bits(rest, name))
    try:
        while True:
            size = len(rest)
            step = unpacker.decompress(rest, STEP_BYTES)
            rest = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            yield step
            if unpacker.eof:
                while len(rest) < len(_GZIP) and (chunk := next(body, b"")):
                    rest += chunk
                if not rest.startswith(_GZIP):
                    return  # what follows the content is no part of it
                unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            elif not rest:
                rest = next(body, b"")
                if not rest and not step and not size:  # the end, and nothing is pending either
                    raise FetchRetryable(f"content encoding {name}: the body is cut short")
            elif not step and len(rest) == size:
                raise broken
    except zlib.error as error:
        raise broken from error


def _window_bits(head: bytes, name: str) -> int:
    """Return zlib's ``wbits`` for gzip, zlib, or a raw stream, which has no header."""
    if head.startswith(_GZIP[:2]):
        return zlib.MAX_WBITS | 16
    has_header = len(head) < 2 or (head[0] & 15 == 8 and int.from_bytes(head[:2], "big") % 31 == 0)
    return -zlib.MAX_WBITS if name == "deflate" and not has_header else zlib.MAX_WBITS
