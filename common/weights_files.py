"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync_file(path: Path) -> None:
    """Push a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_folder(new: Path, target: Path) -> None:
    """Put a folder in the place of another, so that a reader finds the old or the new one.

    Args:
        new: Folder beside the target, which disappears.
        target: Need not exist; a symbolic link is followed.

    Raises:
        OSError: The folders cannot be renamed.
    """
    place = target.resolve()
    if not place.exists():
        new.rename(place)
        return
    if not _exchange(new, place):
        # An old kernel or file system: for an instant nothing is there, and readers try again.
        old = new.with_name(f"{new.name}.old")
        place.rename(old)
        new.rename(place)
        new = old
    shutil.rmtree(new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux 3.15, glibc 2.28)."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        rename = libc.renameat2
    except AttributeError:
        return False
    result = rename(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(first)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(second)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    return bool(result == 0)
