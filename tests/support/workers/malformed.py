"""Messages of a worker that are none, and the reason for which the King refuses each."""

import pickle
from typing import Any

import msgspec

from workers.pool.channel import encode
from workers.protocol import MAX_PARTS, Ready


def body_of(*fields: Any) -> bytes:
    """The body of a message of these fields."""
    return msgspec.msgpack.encode(fields)


MALFORMED: tuple[tuple[bytes, str], ...] = (
    (pickle.dumps(Ready()), "cannot be read"),
    (b"no message", "cannot be read"),
    (b"", "truncated"),
    (bytes(encode(Ready({"a": "b"}))[8:-1]), "truncated"),
    (b"\x91" * 100_000, "str.*array"),
    (body_of("Evil"), "Evil"),
    (body_of("Launch", "os:system", "fetch", "n", "{}"), "Launch"),
    (body_of("Began", [1, "2"]), r"int.*str.*\$\[1\]\[1\]"),
    (body_of("Began", 5), r"array.*int.*\$\[1\]"),
    (body_of("Ready", {"a": 1}), "str.*int"),
    (body_of("Refused", b"no"), "str.*bytes"),
    (body_of("BundleLoaded", "name", 2), "str.*int"),
    (body_of("Failed", 1, "no"), "object.*str"),
    (body_of("Failed", 1, {"stage": "a", "type": "b", "message": 5}), "message"),
    (body_of("Done", [], ["Fetched", "p", 1]), "int.*array"),
    (body_of("Done", 1, ["Decoded", ["part"], {}]), "array.*str"),
    (body_of("Done", 1, ["Decoded", [], {"smell": {}}]), "smell"),
    (body_of("Done", 1, ["Decoded", 5, {}]), r"array.*int.*\$\[2\]"),
    (body_of("Done", 1, ["Decoded", [], 5]), "object.*int"),
    (
        body_of("Done", 1, ["Decoded", [["Part", "x", ["ArrayRef", 3, 0, [1], "uint8"]]]]),
        "Invalid enum value 'x'",
    ),
    (body_of("Done", 1, ["Decoded", [["Part", "image", ["ArrayRef", 3, -1, [1], "u"]]]]), ">= 0"),
    (body_of("Done", 1, ["Decoded", [["Part", "image", ["ArrayRef", 3, 0, [-1], "u"]]]]), ">= 0"),
    (
        body_of(
            "Done",
            1,
            ["Decoded", [["Part", "image", ["ArrayRef", 3, 0, [1], "u"]]] * (MAX_PARTS + 1)],
        ),
        "length <= 4096",
    ),
    (body_of("Done", 1, ["Extracted", ["float32", [1], b"1234"]]), "not float16"),
    (body_of("Done", 1, ["Extracted", ["float16", [3], b"12"]]), "cannot reshape"),
    (body_of("Done", 1, ["Extracted", "array"]), "unpack"),
    (body_of("Done", 1, ["Extracted", None, "x", {"smell": None}]), "smell"),
)
