"""Output of the corpus commands: files that appear whole, posts as lines, counts of a run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from common.files import new_file, write_whole
from common.tables import print_table
from fusion.data.data_file import MEDIA_KEYS, BadLine, CorpusPost

Form: TypeAlias = Literal["json", "jsonl"]
"""Format of a data file: one list, or a line for each entry."""


class AtomicLines:
    """A text file of lines that takes its name only when all of it is on the disk.

    Used with ``with``: an exception inside removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._context = new_file(path)
        self._file: IO[bytes]

    def __enter__(self) -> AtomicLines:
        self._file = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def write(self, line: str) -> None:
        """Add a line; the newline is added here."""
        self._file.write(line.encode("utf-8") + b"\n")

    def sync(self) -> None:
        """Flush to the disk, so that only the rename remains."""
        self._file.flush()
        os.fsync(self._file.fileno())


class DataFile:
    """A data file that is written an entry at a time: a JSON list, or JSON lines."""

    def __init__(self, lines: AtomicLines, form: Form) -> None:
        self._lines, self._form = lines, form
        self._last: str | None = None
        if form == "json":
            lines.write("[")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry; in a list the previous one, which needs a comma now."""
        text = json.dumps(entry, ensure_ascii=False)
        if self._form == "jsonl":
            self._lines.write(text)
            return
        if self._last is not None:
            self._lines.write(self._last + ",")
        self._last = text

    def end(self) -> None:
        if self._form == "json":
            if self._last is not None:
                self._lines.write(self._last)
            self._lines.write("]")


_MAX_REASONS = 1000


class Summary:
    """Counts of one run; `show` prints them, `write` keeps them.

    Attributes:
        figures: Further figures by name, in the order in which they were set.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: dict[str, int | float | str] = {}
        self._done = 0
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def done(self, count: int = 1) -> None:
        self._done += count

    def skipped(self, reason: str, count: int = 1) -> None:
        count_name(self._skipped, reason, count, "other reasons")

    def failed(self, reason: str, count: int = 1) -> None:
        """Count what failed; reasons are classes of failures, not single ones."""
        count_name(self._failed, reason, count, "other reasons")

    @property
    def total(self) -> int:
        return self._done + self._skipped.total() + self.failures

    @property
    def failures(self) -> int:
        return self._failed.total()

    def as_dict(self) -> dict[str, object]:
        """Return ``{total, done, skipped: {reason: n}, failed: {reason: n}, ...figures}``."""
        return {
            "total": self.total,
            "done": self._done,
            "skipped": dict(sorted(self._skipped.items())),
            "failed": dict(sorted(self._failed.items())),
            **self.figures,
        }

    @classmethod
    def of(cls, title: str, content: Mapping[str, Any]) -> Summary:
        """Restore a summary from `as_dict`, to go on counting."""
        summary = cls(title)
        summary._done = int(content["done"])
        summary._skipped.update(content["skipped"])
        summary._failed.update(content["failed"])
        own = {"total", "done", "skipped", "failed"}
        summary.figures = {name: value for name, value in content.items() if name not in own}
        return summary

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(self.as_dict(), ensure_ascii=False, indent=2))

    def show(self) -> None:
        """Print the counts and their reasons as a table."""
        rows = [("done", f"{self._done:,}", "")]
        for word, counts in (("skipped", self._skipped), ("failed", self._failed)):
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
                rows.append((word, f"{count:,}", reason))
        for name, value in self.figures.items():
            rows.append((name, f"{value:,}" if isinstance(value, int) else str(value), ""))
        print_table(self.title, ("", "count", "reason"), rows, right=(1,), width=120)


def count_name(counts: Counter[str], name: str, count: int = 1, others: str = "others") -> None:
    """Count by name; names that never repeat must not fill the memory."""
    listed = name in counts or len(counts) < _MAX_REASONS
    counts[name if listed else others] += count


def post_line(entry: CorpusPost) -> str:
    """Return a post as a line of a posts file, without newline; the same post, the same bytes."""
    post = entry.post
    content: dict[str, Any] = {
        "post_id": post.post_id,
        "labels": list(post.labels),
        "text": post.text,
        "ocr": post.ocr,
    }
    for kind, key in MEDIA_KEYS.items():
        content[key] = [media.source for media in post.media if media.kind == kind]
    content |= {"author": entry.author, "created": entry.created}
    if entry.features is not None:
        content["features"] = entry.features
    return json.dumps(content, ensure_ascii=False)


def bad_line(entry: BadLine) -> str:
    """Return a line of a file of rejects: ``{line, post_id, reason}``."""
    content = {"line": entry.line, "post_id": entry.post_id, "reason": entry.reason}
    return json.dumps(content, ensure_ascii=False)
