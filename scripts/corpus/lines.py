"""JSON-lines files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import TextIO


class AtomicLines:
    """A text file of lines that takes its name only when all of it is on the disk.

    Used with ``with``: an exception inside removes what was written. Of a process that was killed
    a hidden file ``.NAME.part`` stays, which the next one to write NAME begins anew.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._part = part_of(self.path)
        self._file: TextIO | None = None

    def __enter__(self) -> AtomicLines:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("w", encoding="utf-8", newline="\n")
        return self

    def write(self, line: str) -> None:
        """Add a line; its end is added here.

        Raises:
            ValueError: Outside the ``with`` block.
            OSError: The disk is full, or gone.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: not open")
        self._file.write(line + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if kind is None:
                publish(self._part, self.path)
                return
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            self._part.unlink(missing_ok=True)
            if kind is None:
                raise
        self._part.unlink(missing_ok=True)


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


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Raises:
        OSError: The disk is full, or gone.
    """
    with AtomicLines(path) as lines:
        lines.write(text.removesuffix("\n"))
