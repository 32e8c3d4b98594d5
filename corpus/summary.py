"""How many of what were done, skipped or failed, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_whole

_MAX_REASONS = 1000
_OTHER = "other reasons"


class Summary:
    """Counts of one run; `show` prints them, `write` keeps them.

    Attributes:
        facts: Further figures by name, in the order in which they were set.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.facts: dict[str, int | float | str] = {}
        self._done = 0
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def done(self, count: int = 1) -> None:
        """Count what was done."""
        self._done += count

    def skipped(self, reason: str, count: int = 1) -> None:
        """Count what was left out on purpose."""
        _add(self._skipped, reason, count)

    def failed(self, reason: str, count: int = 1) -> None:
        """Count what failed; reasons are classes of failures, not single ones."""
        _add(self._failed, reason, count)

    @property
    def total(self) -> int:
        """All that was counted."""
        return self._done + self._skipped.total() + self._failed.total()

    @property
    def failures(self) -> int:
        """All that failed."""
        return self._failed.total()

    def as_dict(self) -> dict[str, object]:
        """``{total, done, skipped: {reason: n}, failed: {reason: n}, facts…}``, reasons sorted."""
        return {
            "total": self.total,
            "done": self._done,
            "skipped": dict(sorted(self._skipped.items())),
            "failed": dict(sorted(self._failed.items())),
            **self.facts,
        }

    @classmethod
    def of(cls, title: str, content: Mapping[str, Any]) -> Summary:
        """The reverse of `as_dict`, to go on counting.

        Raises:
            KeyError: It is no such content.
        """
        summary = cls(title)
        summary._done = int(content["done"])
        summary._skipped.update(content["skipped"])
        summary._failed.update(content["failed"])
        own = {"total", "done", "skipped", "failed"}
        summary.facts = {name: value for name, value in content.items() if name not in own}
        return summary

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(self.as_dict(), ensure_ascii=False, indent=2))

    def show(self) -> None:
        """Print the table to standard output."""
        import sys

        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("count", justify="right")
        table.add_column("reason", overflow="fold")
        table.add_row("done", f"{self._done:,}", "")
        for word, counts in (("skipped", self._skipped), ("failed", self._failed)):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                table.add_row(word, f"{count:,}", Text(reason))
        for name, value in self.facts.items():
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(Text(name), shown, "")
        width = None if sys.stdout.isatty() else 120
        Console(width=width, highlight=False).print(table)


def _add(counts: Counter[str], reason: str, count: int) -> None:
    """Reasons that never repeat must not fill the memory."""
    known = reason in counts or len(counts) < _MAX_REASONS
    counts[reason if known else _OTHER] += count
