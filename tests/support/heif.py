"""A HEIC picture put together by hand: turned, mirrored, of one HEVC frame that is kept here."""

import base64
import struct

_CONFIGURATION = (
    "AQQIAAAAnggAAAAAHvAA/P/4+AAADwMgAAEAF0ABDAH//wQIAAADAJ4IAAADAAAelZQJIQABAChCAQEECAAAAwCeCAAA"
    "AwAAHpAGECCyysqUmFzQEAAAAwAQAAADABCAIgABAAhEAcBzGDAYkA=="
)
_FRAME = (
    "AAABTigBrBrR+kDv3pn/VSn//+zpbyH8l74gvUkznu2Bf/bQv//PFINwyPM9Qj7HUCo1y9sZWZKJ2x3g1w8av8O6ifg/"
    "mvn3ePeBitSvl4Aktpv7AuU89Q9LYADfY9o7KrJD6/g7e5YMbDx0hTGUV95pz6+JBXH1mzEQ6/PhB9DglY/8l39G/aFU"
    "f/7X5liGURLXfBXYK4oCbLarvVnqbh/B4uathHZaLnMVQrjlaeCCQTQg4qcc3/6T6Zm3Z/MnwR/z/8p/eONwvB+BE/f7"
    "1WserJaoZJ4VSED613U/r6fO1LrfozzmmXXrX4uV0NeyzC/w6Srs8kcmcfA2/e9dh7K3oiujTjMbN3oLYPf0hiRDhyVX"
    "Z6g5SvieDPnq7WjPjEsdLimzJaUv6LT8CKqi8jeJR/AQKISold8h5Ky9eveIj81TuMqtqG7NGbiq7/YfXcA="
)
"""`media.quadrants(96, 64)` by x265, 4:4:4, nearly without loss."""

_TURNS: dict[int, tuple[int, int | None]] = {
    1: (0, None),
    2: (0, 1),
    3: (2, None),
    4: (0, 0),
    5: (1, 0),
    6: (3, None),
    7: (3, 0),
    8: (1, None),
}
"""EXIF orientation -> quarter turns counter-clockwise (irot) and the axis of mirroring (imir)."""


def _box(kind: bytes, *parts: bytes, full: int | None = None) -> bytes:
    body = (b"" if full is None else struct.pack(">I", full)) + b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def heic(orientation: int = 1) -> bytes:
    """The file of a picture that EXIF's `orientation` would turn as its irot and imir do."""
    data = base64.b64decode(_FRAME)
    turns, axis = _TURNS[orientation]
    properties = [
        _box(b"hvcC", base64.b64decode(_CONFIGURATION)),
        _box(b"ispe", struct.pack(">II", 96, 64), full=0),
    ]
    if turns:
        properties.append(_box(b"irot", bytes([turns])))
    if axis is not None:
        properties.append(_box(b"imir", bytes([axis])))
    used = bytes([0x81, 0x02, *(0x81 + i for i in range(2, len(properties)))])
    listed = _box(b"ipma", struct.pack(">IHB", 1, 1, len(used)), used, full=0)
    entry = _box(b"infe", struct.pack(">HH4s", 1, 0, b"hvc1"), b"\0", full=0x02000000)

    def meta(offset: int) -> bytes:
        place = struct.pack(">BBHHHHII", 0x44, 0, 1, 1, 0, 1, offset, len(data))
        return _box(
            b"meta",
            _box(b"hdlr", struct.pack(">I4s12x", 0, b"pict"), b"\0", full=0),
            _box(b"pitm", struct.pack(">H", 1), full=0),
            _box(b"iloc", place, full=0),
            _box(b"iinf", struct.pack(">H", 1), entry, full=0),
            _box(b"iprp", _box(b"ipco", *properties), listed),
            full=0,
        )

    head = _box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    return head + meta(len(head) + len(meta(0)) + 8) + _box(b"mdat", data)
