"""Files: their digest, and how one appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def file_digest(*paths: Path) -> str:
    """Hex sha256 over the content of files, in the order given.

    Raises:
        OSError: One of them cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the one before or all of this one; its folder is made.

    Raises:
        OSError: It cannot be written; the one before is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The hidden name beside a file that it has while it is being written."""
    return path.with_name(f".{path.name}.part")


def publish(part: Path, path: Path) -> None:
    """Give a written and synced file its name, and make that last through a power cut."""
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Push a folder's entries to the disk; file systems that cannot are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
