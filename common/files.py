"""Files and folders that appear whole or not at all, locks, and digests."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import BaseFileLock, FileLock

from common.errors import ConfigError, path_told, replaced, told

_BLOCK_BYTES = 1 << 20  # read at once for a digest: larger is no faster, smaller costs calls

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Of Linux' renameat2(2).
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def read_text(
    path: Path, name: str = "", *, missing: str = "no such file", encoding: str = "utf-8"
) -> str:
    """Return a text that the user has named; ConfigError names it, and what is wrong with it."""
    name = name or str(path)
    with (
        path_told(f"{name}: cannot be read"),
        told(f"{name}: cannot be read", UnicodeDecodeError),
        replaced(ConfigError(f"{name}: {missing}"), FileNotFoundError),
    ):
        return path.read_text(encoding)


def file_digest(*paths: Path) -> str:
    """Return the hex sha256 over the content of files, in the given order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold a lock while the block runs; see `lock_file`."""
    lock = lock_file(path, timeout_s)
    try:
        yield
    finally:
        lock.release()


def lock_file(path: Path, timeout_s: float = 0.0) -> BaseFileLock:
    """Take a lock; the kernel frees it when the process ends, however it ends.

    The lock file stays; its folder is made. A time-out below 0 waits without end. Raises
    TimeoutError when another process holds it, OSError when the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No fallback: a lock that is a mere file outlives a killed holder, and blocks everybody.
    lock = FileLock(path, timeout_s, thread_local=False, fallback_to_soft=False)
    lock.acquire()
    return lock


def write_whole(
    path: Path, content: bytes | str, *, sync: bool = True, shared: bool = False
) -> None:
    """Write a file so that a reader sees the old content or the new; its folder is made.

    A text is written in UTF-8 and ends with one end of line. See `new_file` for the options.
    """
    with new_file(path, sync=sync, shared=shared) as file:
        if isinstance(content, str):
            content = (content.removesuffix("\n") + "\n").encode("utf-8")
        file.write(content)


@contextlib.contextmanager
def new_file(path: Path, *, sync: bool = True, shared: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when the block ends; an exception removes it.

    `sync` lets it survive a power cut, which costs a few milliseconds for each file. A `shared` one
    several processes may write at once: each writes a part with a name of its own, which stays if
    the process is killed; otherwise the next writer reuses it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part") if shared else part_of(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if sync:
            publish(part, path)
        else:
            part.replace(path)
    except OSError as error:
        # The system's own error of a write names no file, so that of a full disk would not.
        if error.filename is None and error.errno in _CANNOT_WRITE:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the place of another when the block ends.

    An exception removes it and leaves the old folder intact. A symbolic link is followed.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                sync_file(file)
        _replace_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Link a file that nobody changes; copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def part_of(path: Path) -> Path:
    """Return the hidden name that a file has while it is being written."""
    return path.with_name(f".{path.name}.part")


def publish(part: Path, path: Path) -> None:
    """Give a written and synced file its name, and make that survive a power cut."""
    part.replace(path)
    # Some file systems cannot sync a folder: there the name may be lost, never the content.
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    if not _exchange(new, target):
        # An old kernel or file system: for an instant the folder is missing, and readers retry.
        old = target.rename(new.with_name(f"{new.name}.old"))
        new.rename(target)
        new = old
    shutil.rmtree(new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux 3.15, glibc 2.28)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
