"""Media files on disk: the spool, the folder of downloads until they are decoded, and local files.

Each King has a folder of its own with a lock that the kernel frees when the King ends, however
it ends; at start the folders of dead Kings are removed. A lock, and not a process ID: Kings in
containers share a host's disk and not its process IDs.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import ConfigError, FetchRefused
from common.files import lock_file, locked
from workers.protocol import Fetched

_LOCK = "lock"
_PREFIX = "king-"


class Spool:
    """One King's folder.

    Attributes:
        folder: The folder, readable by this user only.
    """

    def __init__(self, root: Path) -> None:
        """Make the folder and remove those of dead Kings.

        Raises:
            ConfigError: The spool cannot be written.
        """
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            # One King at a time: a folder is not yet locked in the moment after it is made.
            with locked(root / ".lock", timeout_s=-1):
                _remove_dead(root)
                self.folder = (root / f"{_PREFIX}{secrets.token_hex(8)}").resolve()
                self.folder.mkdir(mode=0o700)
                self._lock = lock_file(self.folder / _LOCK)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"fetch.spool: {root} cannot be used: {reason}") from error

    def remove_of(self, task_ids: Iterable[int]) -> None:
        for task_id in task_ids:
            for path in self.folder.glob(f"{task_id}-*"):
                path.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """Remove one file, if it lies in this spool."""
        if Path(path).parent == self.folder:
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def file_name(task_id: int) -> str:
    """Return a name that cannot be guessed and starts with its task, to find leftovers."""
    return f"{task_id}-{secrets.token_hex(16)}"


def _remove_dead(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            with locked(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)


def is_url(source: str) -> bool:
    """Tell whether a source is to be downloaded; ``C:/a.png`` and ``a.png`` are paths."""
    try:
        return len(urlsplit(source).scheme) > 1
    except ValueError:  # a broken host in brackets: the downloader says what is wrong with it
        return "://" in source


def local_file(source: str, *, root: Path | None = None) -> Fetched:
    """Return a file that is read in place.

    Args:
        source: Its path.
        root: The only folder whose files may be read, links followed; None: any.

    Raises:
        FetchRefused: There is no such file, or it lies elsewhere.
    """
    path = Path(source)
    try:
        if root is not None and path.resolve().parent != root.resolve():
            raise FetchRefused("a local path is no source of media here")
        if not path.is_file():
            raise FetchRefused(f"{path}: no such file")
        return Fetched(str(path), path.stat().st_size)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise FetchRefused(f"{path}: {getattr(error, 'strerror', None) or error}") from error
