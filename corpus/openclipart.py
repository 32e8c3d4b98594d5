"""Posts of a real benchmark: the drawings of Debian's ``openclipart-svg`` and ``openclipart-png``.

A drawing is a PNG file, and an SVG file whose RDF names title, description, keywords and creator.
The keywords become labels, title and description the text, the PNG the picture. All of it is in
the public domain.
"""

from __future__ import annotations

import hashlib
import html
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import ConfigError
from common.progress import track

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"

# Folders without subjects: buttons, logos and shapes carry keywords of their use, not of what is
# seen, and "unsorted" and "special" whatever came in.
LEFT_OUT_FOLDERS = frozenset({"computer", "shapes", "special", "unsorted", "logos", "buttons"})

# Keywords that name the medium or the style.
MEDIUM_WORDS = frozenset(
    {
        *("clip art", "clipart", "icon", "icons", "outline", "color", "colour", "theme"),
        *("unsorted", "simple", "bordered", "ornamental", "white", "hash", "led"),
    }
)
NOBODY = frozenset({"", "unknown", "anonymous", "n/a", "none"})


@dataclass(frozen=True)
class Drawing:
    """One drawing: keywords normalised, ``author`` None when nobody is named."""

    post_id: str
    picture: Path
    text: str
    keywords: frozenset[str]
    author: str | None


def read_drawings(folder: Path) -> tuple[list[Drawing], list[Path]]:
    """Return the drawings of ``folder/svg`` that have a PNG, and the SVG files that are broken.

    The library files one drawing in several places: links are passed over, and of equal PNG files
    the first stands for all, with the keywords of all.

    Raises:
        ConfigError: The folder does not hold the two packages.
    """
    drawn, pictures = folder / "svg", folder / "png"
    if not drawn.is_dir() or not pictures.is_dir():
        raise ConfigError(
            f"{folder}: no svg/ and png/ here; apt-get install openclipart-svg openclipart-png, or "
            "unpack the two packages with dpkg-deb -x and name their usr/share/openclipart"
        )
    known: dict[str, Drawing] = {}
    broken = []
    paths = sorted(drawn.rglob("*.svg"))
    for path in track(paths, "drawings", len(paths)):
        place = path.relative_to(drawn)
        picture = (pictures / place).with_suffix(".png")
        if place.parts[0] in LEFT_OUT_FOLDERS or path.is_symlink() or not picture.is_file():
            continue
        try:
            root = ET.parse(path).getroot()  # noqa: S314 - a Debian package's own files
        except (ET.ParseError, ValueError):
            broken.append(path)
            continue
        digest = hashlib.sha256(picture.read_bytes()).hexdigest()
        drawing = _drawing(root, f"{path.stem}-{digest[:8]}", picture)
        first = known.setdefault(digest, drawing)
        known[digest] = replace(first, keywords=first.keywords | drawing.keywords)
    return list(known.values()), broken


def choose_labels(drawings: Iterable[Drawing], min_posts: int) -> dict[str, int]:
    """Return how many drawings carry each keyword that is a label, the names in order.

    A label is carried by ``min_posts`` drawings at least, and names neither the medium nor a
    creator: both would tell who drew it rather than what is seen.
    """
    drawings = list(drawings)
    creators = {_plain(drawing.author) for drawing in drawings if drawing.author}
    carried = Counter(keyword for drawing in drawings for keyword in drawing.keywords)
    return {
        keyword: n
        for keyword, n in sorted(carried.items())
        if n >= min_posts and keyword not in MEDIUM_WORDS and keyword not in creators
    }


def _drawing(root: ET.Element, post_id: str, picture: Path) -> Drawing:
    words = (_text(each) for each in root.iterfind(f".//{_DC}subject//{_RDF}li"))
    texts = (_text(root.find(f".//{_DC}{key}")) for key in ("title", "description"))
    author = _plain(_text(root.find(f".//{_DC}creator")))
    return Drawing(
        post_id=post_id,
        picture=picture,
        text="\n".join(text for text in texts if text),
        keywords=frozenset(_plain(word) for word in words) - {""},
        author=None if author in NOBODY else author,
    )


def _text(element: ET.Element | None) -> str:
    # Entities are escaped twice in many files.
    text = "" if element is None else html.unescape("".join(element.itertext()))
    return " ".join(text.split())


def _plain(text: str) -> str:
    return re.sub(r"[\s_]+", " ", text).strip().lower()
