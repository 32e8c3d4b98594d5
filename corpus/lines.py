"""JSON-lines files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO, TypeAlias

from common import files

Form: TypeAlias = Literal["json", "jsonl"]
"""Of a data file: one list, or a line each."""


class AtomicLines:
    """A text file of lines that takes its name only when all of it is on the disk.

    Used with ``with``: an exception inside removes what was written. Of a process that was killed
    a hidden file ``.NAME.part`` stays, which the next one to write NAME begins anew.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._part = files.part_of(self.path)
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

    def sync(self) -> None:
        """Push what was written to the disk, so that only the name is still to be given.

        Raises:
            OSError: The disk is full, or gone.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

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
                files.publish(self._part, self.path)
                return
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            self._part.unlink(missing_ok=True)
            if kind is None:
                raise
        self._part.unlink(missing_ok=True)


class DataFile:
    """A data file that is written an entry at a time: a JSON list, or JSON lines."""

    def __init__(self, lines: AtomicLines, form: Form) -> None:
        self._lines, self._form = lines, form
        self._held: str | None = None
        if form == "json":
            lines.write("[")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry; of a list always the one before, whose comma is only known now."""
        text = json.dumps(entry, ensure_ascii=False)
        if self._form == "jsonl":
            self._lines.write(text)
            return
        if self._held is not None:
            self._lines.write(self._held + ",")
        self._held = text

    def end(self) -> None:
        """Write what the list still lacks."""
        if self._form == "json":
            if self._held is not None:
                self._lines.write(self._held)
            self._lines.write("]")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, and ends with an end of line.

    Raises:
        OSError: The disk is full, or gone.
    """
    files.write_whole(path, (text.removesuffix("\n") + "\n").encode("utf-8"))
