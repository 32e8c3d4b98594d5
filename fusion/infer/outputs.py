"""Where tags go: JSON lines or CSV in a file, or anything else that is a `Sink`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.post import Failure, Modality, Status, Tags
from common.result import TagResult, rounded
from fusion.infer.input import Bad

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Result:
    """The tags of one post.

    Attributes:
        labels: Names of its true tags, where they are known.
        statuses: Which modalities there were.
        failures: Why some could not be used.
    """

    tags: Tags
    labels: tuple[str, ...] = ()
    statuses: Mapping[Modality, Status] = field(default_factory=dict)
    failures: Mapping[Modality, Failure] = field(default_factory=dict)

    @property
    def post_id(self) -> str:
        """Its ID."""
        return self.tags.post_id


class Sink(Protocol):
    """Something that takes results away; what it takes is safe when `write` returns."""

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Take results, in order; gives those that it could not take."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Form(Protocol):
    """How results become text."""

    def head(self) -> str:
        """What comes first."""
        ...

    def text(self, results: Sequence[Result]) -> str:
        """Some results."""
        ...


class TextSink:
    """Results as text; see `Sink`.

    Args:
        form: Of the text.
        write: Takes text away.
        begun: Whether the head is written already.
    """

    def __init__(self, form: Form, write: Callable[[str], object], *, begun: bool) -> None:
        self._form, self._write, self._begun = form, write, begun

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Write them; none is refused."""
        self._write(("" if self._begun else self._form.head()) + self._form.text(results))
        self._begun = True
        return ()

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class JsonLines:
    """A line for each post: the result's document, as `insighttag tag` prints it.

    Then ``labels`` where they are known, and ``scores``: every class, with all digits, so that
    reading them gives the same float32 numbers again.

    Attributes:
        scores: Write the score of every class.
    """

    scores: bool = True

    def head(self) -> str:
        """Nothing."""
        return ""

    def text(self, results: Sequence[Result]) -> str:
        """A line for each."""
        return "".join(self._line(result) for result in results)

    def _line(self, result: Result) -> str:
        tags = result.tags
        content = TagResult.tagged(tags, result.statuses, result.failures).answer()
        if result.labels:
            content["labels"] = list(result.labels)
        if self.scores:
            content["scores"] = [float(score) for score in tags.scores]
        return json.dumps(content, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class CsvTable:
    """Columns ``post_id, tags, scores, model, version``, and one for each class.

    ``tags`` and ``scores`` hold as many items, with a bar between them. Text that a spreadsheet
    would take for a formula gets an apostrophe in front.

    Attributes:
        names: Of the classes.
        scores: Write a column for each class.
    """

    names: tuple[str, ...]
    scores: bool = True

    def head(self) -> str:
        """The names of the columns."""
        columns = ["post_id", "tags", "scores", "model", "version"]
        return _row([*columns, *(f"score {name}" for name in self.names if self.scores)])

    def text(self, results: Sequence[Result]) -> str:
        """A row for each."""
        return "".join(self._line(result.tags) for result in results)

    def _line(self, tags: Tags) -> str:
        columns = [
            plain(tags.post_id),
            plain("|".join(tag.name.replace("|", "/") for tag in tags.tags)),
            "|".join(repr(rounded(tag.score)) for tag in tags.tags),
            plain(tags.model),
            tags.version,
        ]
        return _row([*columns, *(repr(float(score)) for score in tags.scores if self.scores)])


def plain(text: str) -> str:
    """Text that no spreadsheet runs: one that begins like a formula gets an apostrophe.

    Source: OWASP, CSV injection.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def _row(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue()
