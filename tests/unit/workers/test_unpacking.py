"""Bodies that servers packed: every encoding, whole and damaged, and labels that are none."""

import gzip
import zlib
from collections.abc import Callable, Iterator

import pytest

from common.errors import FetchRefused, FetchRetryable
from workers.fetch import STEP_BYTES, unpacked

CONTENT = bytes(range(256)) * 400
PICTURE = b"\x89PNG\r\n\x1a\n" + CONTENT
STRAY = [b"x", b"\0" * 1000, b"\x1f", b"\x1f\x8b", b"\r\n", CONTENT]


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip ": gzip.compress,
    "aws-chunked, gzip": gzip.compress,
    "gzip ": zlib.compress,
    "deflate": zlib.compress,
    " deflate": raw_deflate,
    "Deflate": gzip.compress,
}


def unpack(body: bytes, label: str, chunk: int = 1 << 16) -> bytes:
    steps = list(unpacked((body[i : i + chunk] for i in range(0, len(body), chunk)), label))
    assert all(len(step) <= max(STEP_BYTES, chunk) for step in steps[1:])
    return b"".join(steps)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("label", PACKERS)
def test_packed_body_is_unpacked_whole(label: str, chunk: int) -> None:
    """The size of the chunks makes no difference, and bytes behind the body are ignored."""
    packed = PACKERS[label](CONTENT)
    assert unpack(packed, label, chunk) == CONTENT
    for stray in STRAY:
        assert unpack(packed + stray, label, chunk) == CONTENT
    assert unpack(PACKERS[label](b""), label, chunk) == b""
    assert unpack(b"", label) == b""


@pytest.mark.parametrize("label", PACKERS)
def test_cut_body_may_be_whole_the_next_time(label: str) -> None:
    """At every length, within the header, the content or the checksum."""
    packed = PACKERS[label](b"some content")
    for length in range(1, len(packed)):
        with pytest.raises(FetchRetryable, match=r"the body is cut short$"):
            unpack(packed[:length], label)


@pytest.mark.parametrize("chunk", [1, 10, 1 << 16])
def test_several_members_are_one_body(chunk: int) -> None:
    """As gzip defines it, also empty ones; the last one must be whole as well."""
    members = gzip.compress(CONTENT) + gzip.compress(b"") + gzip.compress(b"end")
    assert unpack(members, "gzip", chunk) == CONTENT + b"end"
    assert unpack(members + b"x", "gzip", chunk) == CONTENT + b"end"
    with pytest.raises(FetchRetryable, match="cut short"):
        unpack(members[:-1], "gzip", chunk)


@pytest.mark.parametrize("label", PACKERS)
def test_bomb_comes_in_small_steps(label: str) -> None:
    """The reader can stop after any of them."""
    steps = unpacked(iter([PACKERS[label](bytes(50_000_000))]), label)
    assert [len(next(steps)) for _ in range(20)] == [STEP_BYTES] * 20
    assert 20 * STEP_BYTES + sum(map(len, steps)) == 50_000_000


@pytest.mark.parametrize("label", [label for label in PACKERS if label != " deflate"])
def test_damaged_body_is_refused(label: str) -> None:
    """All but a raw stream have a checksum, which is their last or last but one number."""
    packed = bytearray(PACKERS[label](CONTENT))
    packed[-5 if packed[0] == 0x1F else -1] ^= 255
    for body in (bytes(packed), b"\xff" * 100):
        with pytest.raises(FetchRefused, match=r"content encoding \S+: the body is broken$"):
            unpack(body, label)


@pytest.mark.parametrize("label", ["", "identity", "none", "UTF-8", "aws-chunked", "none, utf-8"])
def test_label_that_is_no_packing_is_ignored(label: str) -> None:
    for body in (b"", b"x", CONTENT, PICTURE):
        assert unpack(body, label) == body


@pytest.mark.parametrize("label", ["br", "zstd", "compress", "gzip, gzip", "image/jpeg", "7bit"])
def test_label_that_is_not_known_is_named(label: str) -> None:
    """Unless the body is media as it is: then the label is wrong."""
    with pytest.raises(FetchRefused, match=f"content encoding '{label}' cannot be unpacked here"):
        unpack(CONTENT, label)
    assert unpack(PICTURE, label) == PICTURE


@pytest.mark.parametrize("label", PACKERS)
def test_media_that_are_called_packed_are_taken_as_they_are(label: str) -> None:
    assert unpack(PICTURE, label, 5) == PICTURE


def test_nothing_is_read_behind_the_content() -> None:
    """An endless answer ends with its content."""

    def endless() -> Iterator[bytes]:
        yield gzip.compress(CONTENT)
        while True:
            yield b"stray"

    assert b"".join(unpacked(endless(), "gzip")) == CONTENT
