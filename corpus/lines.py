"""JSON-lines files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeAlias

from common.files import new_file

Form: TypeAlias = Literal["json", "jsonl"]
"""Of a data file: one list, or a line each."""


class AtomicLines:
    """A text file of lines that takes its name only when all of it is on the disk.

    Used with ``with``: an exception inside removes what was written. A process that is killed
    leaves a hidden file ``.NAME.part``, which the next one to write NAME begins anew.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AtomicLines:
        self._file = self._stack.enter_context(new_file(self.path))
        return self

    def write(self, line: str) -> None:
        """Add a line; its end is added here.

        Raises:
            ValueError: Outside the ``with`` block.
            OSError: The disk is full, or gone.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: not open")
        self._file.write(line.encode("utf-8") + b"\n")

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
        self._file = None
        self._stack.__exit__(kind, error, trace)


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
