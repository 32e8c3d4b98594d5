"""Work as files that actors on other machines read: a folder that goes when its run ends."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from common.files import lock_file, locked
from corpus.extract.values import Work

_PREFIX, _MAKING = ".extract-", ".making-"
_LOCK = "lock"
_MADE_WITHIN_S = 3600.0
"""A folder without a lock may be one that is made just now; one so old was left by a kill."""
_FIRST, _LARGEST, _GROW_EVERY = 16, 512, 64


class PartFolder:
    """Files of a few posts each, in a hidden folder of the feature root.

    Its lock is freed by the kernel when this run ends, however it ends; the next run removes what
    has no living owner. The actors note their tries here: see `tries`.

    Attributes:
        folder: The folder; every node sees it under this path.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _remove_dead(root)
        name = secrets.token_hex(6)
        # Locked before it has its name, so that nobody takes it for the folder of a dead run.
        made = root / f"{_MAKING}{name}"
        made.mkdir()
        self._lock = lock_file(made / _LOCK)
        self.folder = root / f"{_PREFIX}{name}"
        made.rename(self.folder)

    def write(self, works: Iterable[Work]) -> list[str]:
        """Write the work and give the files; they grow, so that few posts spread as well."""
        paths: list[str] = []
        lines: list[str] = []
        for work in works:
            lines.append(work.as_json())
            if len(lines) >= min(_LARGEST, _FIRST * (1 + len(paths) // _GROW_EVERY)):
                paths.append(self._part(len(paths), lines))
                lines = []
        if lines:
            paths.append(self._part(len(paths), lines))
        return paths

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _part(self, number: int, lines: list[str]) -> str:
        path = self.folder / f"part-{number:06}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)


def read_part(path: str) -> list[Work]:
    """The work in a file."""
    with Path(path).open(encoding="utf-8") as file:
        return [Work.of_json(line) for line in file]


def tries(folder: Path, name: str) -> int:
    """Note that something is begun; how often it has been, this time included.

    A death cannot be told by who died of it: it is read off the tries that were left without end.
    """
    with (folder / f"tries-{name}").open("ab") as file:
        file.write(b".")
        return file.tell()


def ended(folder: Path, name: str) -> None:
    """Note that something has ended well: its tries are forgotten."""
    (folder / f"tries-{name}").unlink(missing_ok=True)


def _remove_dead(root: Path) -> None:
    made_after = time.time() - _MADE_WITHIN_S
    for folder in (*root.glob(f"{_PREFIX}*"), *root.glob(f"{_MAKING}*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            if folder.name.startswith(_MAKING) and folder.stat().st_mtime > made_after:
                continue
            with locked(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)
