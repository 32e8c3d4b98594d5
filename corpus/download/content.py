"""Files on their way into the output folder: their type, their final path, leftovers of a kill.

    OUT/media/ab/abcd...png              content by its hash; appears whole
    OUT/.state/incoming/KEY.part        being downloaded
    OUT/.state/incoming/KEY-SHA256      downloaded, and not yet put in its place

The middle name carries all that is known of a finished download, so that a process that is killed
right then has lost nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import MediaError
from common.files import file_digest
from corpus.download.values import Found
from extractors.media.sniff import FileType, check_type, sniff

_HEAD_BYTES = 4096
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{64})")
# Families that are not their own extension.
_EXTENSIONS = {
    "jpeg": "jpg",
    "matroska": "mkv",
    "mpeg": "mpg",
    "mpegts": "ts",
    "asf": "wmv",
    "id3": "mp3",
}


def incoming_folder(out: Path) -> Path:
    """Return the folder of downloads that are not in their final place."""
    return out / ".state" / "incoming"


def classify(path: Path, sha256: str) -> Found:
    """Return the type of a downloaded file, or the reason why it is of no use.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        kind = sniff(stream.read(_HEAD_BYTES))
    if not size:
        return _refused("the file is empty")
    if kind is None or not kind.kinds:
        return _refused(f"no media: {kind.name if kind else 'unknown type of file'}")
    try:
        check_type(path, sorted(kind.kinds)[0])
    except MediaError as error:
        return _refused(str(error))
    return Found(
        "ok",
        sha256=sha256,
        extension=_extension(kind),
        size_bytes=size,
        kinds=kind.kinds,
        what=kind.name,
    )


def _refused(message: str) -> Found:
    return Found("refused", reason=(MediaError.__name__, message))


def _extension(kind: FileType) -> str:
    if kind.family == "mp4":
        return {"QuickTime video": "mov", "M4A sound": "m4a"}.get(kind.name, "mp4")
    return _EXTENSIONS.get(kind.family, kind.family)


def place(out: Path, incoming: str, found: Found) -> bool:
    """Move a finished download to its final path; False when the same content is there already.

    Raises:
        OSError: The output folder cannot be written to.
    """
    source = incoming_folder(out) / incoming
    target = out / found.path
    if present(out, found):
        source.unlink(missing_ok=True)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    return True


def present(out: Path, found: Found, *, verify: bool = False) -> bool:
    """Return whether the content is there, by its size, or with `verify` by its hash."""
    path = out / found.path
    try:
        if path.stat().st_size != found.size_bytes:
            return False
        return not verify or file_digest(path) == found.sha256
    except OSError:
        return False


def left_over(out: Path) -> Iterator[tuple[str, str, Found]]:
    """Yield downloads that an earlier run finished and did not record: key, name, result.

    What it had only begun is deleted, and so is what a power cut has spoilt.
    """
    folder = incoming_folder(out)
    for path in sorted(folder.iterdir()):
        named = _NAME.fullmatch(path.name)
        if named is None or file_digest(path) != named[2]:
            path.unlink()
            continue
        yield named[1], path.name, classify(path, named[2])
