"""The failures file: a line for everything that failed, in the order of the input."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from corpus.extract.values import FailedPart
from corpus.records import AtomicLines


class FailureFile:
    """Takes failures as they come and writes them in order at the end of a ``with`` block.

    They wait in a file without a name, which goes with the process however that ends; memory
    holds 16 bytes for each. An exception inside the block leaves the old file as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._indexes = array("q")
        self._offsets = array("q")
        self._waiting = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> FailureFile:
        return self

    def add(self, index: int, failures: Iterable[FailedPart]) -> None:
        """Add the failures of one line of the input."""
        lines = [part.line() for part in failures]
        if lines:
            self._indexes.append(index)
            self._offsets.append(self._waiting.tell())
            self._waiting.write(json.dumps(lines).encode("ascii") + b"\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._waiting:
            if kind is None:
                self._publish()

    def _publish(self) -> None:
        order = sorted(range(len(self._indexes)), key=self._indexes.__getitem__)
        with AtomicLines(self.path) as lines:
            for at in order:
                self._waiting.seek(self._offsets[at])
                for line in json.loads(self._waiting.readline()):
                    lines.write(line)
