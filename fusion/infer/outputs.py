"""Outputs of an inference: JSON lines or CSV, in a file that a killed run goes on with."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, BinaryIO, ClassVar, NamedTuple, Protocol, TextIO, TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, one_line
from common.files import publish, sync_file
from common.post import TagResult, rounded
from fusion.bundle.bundle import Bundle

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Result:
    """The result of one post, its scores ``(classes,)``, and its true tags where known."""

    tagged: TagResult
    scores: npt.NDArray[np.float64]
    labels: tuple[str, ...] = ()

    @property
    def post_id(self) -> str:
        return self.tagged.post_id


@dataclass(frozen=True)
class Bad:
    """A post that cannot be tagged; its ID, or where it stands in the input."""

    post_id: str
    reason: str


Outcome: TypeAlias = Result | Bad


@dataclass(frozen=True)
class Earlier:
    """A post whose tags, and perhaps scores ``(classes,)``, an earlier run has written."""

    scores: npt.NDArray[np.float64] | None = None


class Sink(Protocol):
    """A destination of results; what it takes is safe when `write` returns."""

    def open(self, input_ids: Callable[[], Counter[str]]) -> None:
        """Open the output, and see what an earlier run has written.

        ``input_ids`` reads the IDs of the input's posts, each with the number of its entries; those
        that only their feature files know count as ``""``.
        """

    def written(self, post_ids: Sequence[str]) -> Sequence[Earlier | None]:
        """Return what is written of posts already, None for each that is to be tagged."""
        ...

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        """Take results, in order; return those that could not be taken."""
        ...

    def finish(self) -> None:
        """Make the output whole: everything is written."""

    def close(self) -> None:
        """Let go of what it holds; without `finish` the same command goes on later."""


class Row(NamedTuple):
    """One post's row of an output, as the format writes it; scores of every class, or None."""

    key: str
    model: str
    version: str
    rules: str | None
    scores: Sequence[float] | None


@dataclass(frozen=True)
class JsonLines:
    """A format with a line for each post: the result's document, as `insighttag tag` prints it.

    Then ``labels`` where they are known, and ``scores``: every class, with all digits, so that
    reading them gives the same numbers again. A format has a ``head`` before its rows, and an
    ``end`` of each.
    """

    scores: bool = True
    head: ClassVar[str] = ""
    end: ClassVar[bytes] = b"\n"

    def key(self, text: str) -> str:
        """Return an ID or a name as the format writes it."""
        return text

    def text(self, result: Result) -> str:
        content = result.tagged.answer()
        if result.labels:
            content["labels"] = list(result.labels)
        if self.scores:
            content["scores"] = result.scores.tolist()
        return json.dumps(content, ensure_ascii=False) + "\n"

    def rows(self, file: TextIO) -> Iterator[Row]:
        """Read rows back; a file of another form, or a broken one, is a ValueError."""
        for line in file:
            content = json.loads(line)
            if ("scores" in content) != self.scores:
                raise ValueError(f"was started with other scores ({not self.scores})")
            post_id, model, version = (content[k] for k in ("post_id", "model", "version"))
            yield Row(post_id, model, version, content.get("rules"), content.get("scores"))


@dataclass(frozen=True)
class CsvTable:
    """A format with columns ``post_id, tags, scores, model, version``, and one for each class.

    With rules of serving, a column ``rules`` follows the version. ``tags`` and ``scores`` hold
    the same number of items, with a bar between them. Text that a spreadsheet would take for a
    formula gets an apostrophe in front. The rest is as `JsonLines`.
    """

    names: tuple[str, ...]
    scores: bool = True
    rules: bool = False
    end: ClassVar[bytes] = b"\r\n"

    @property
    def head(self) -> str:
        return _row(self._columns)

    def key(self, text: str) -> str:
        # Source: OWASP, CSV injection.
        return f"'{text}" if text.startswith(_FORMULA) else text

    def text(self, result: Result) -> str:
        tagged = result.tagged
        columns = [
            self.key(tagged.post_id),
            self.key("|".join(tag.name.replace("|", "/") for tag in tagged.tags)),
            "|".join(repr(rounded(tag.score)) for tag in tagged.tags),
            self.key(tagged.model),
            tagged.version,
            *([tagged.rules or ""] if self.rules else ()),
        ]
        return _row([*columns, *(map(repr, result.scores.tolist()) if self.scores else ())])

    def rows(self, file: TextIO) -> Iterator[Row]:
        table = csv.reader(file)
        if next(table, None) != self._columns:
            raise ValueError("was started with other columns")
        for row in table:
            if len(row) != len(self._columns):
                raise ValueError(f"line {table.line_num} has {len(row)} columns")
            post_id, _, _, model, version, *scores = row
            rules = scores.pop(0) if self.rules else None
            numbers = [float(score) for score in scores] if self.scores else None
            yield Row(post_id, model, version, rules, numbers)

    @property
    def _columns(self) -> list[str]:
        columns = ["post_id", "tags", "scores", "model", "version", *["rules"][: self.rules]]
        return [*columns, *(f"score {name}" for name in self.names if self.scores)]


def _row(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue()


class StreamSink:
    """A `Sink` of text that nobody can read back, such as standard output."""

    def __init__(self, form: JsonLines | CsvTable, write: Callable[[str], object]) -> None:
        self._form, self._write, self._begun = form, write, False

    def open(self, input_ids: Callable[[], Counter[str]]) -> None:
        """Write nothing: the head comes with the first results."""

    def written(self, post_ids: Sequence[str]) -> Sequence[Earlier | None]:
        return [None] * len(post_ids)

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        self._write(
            "".join(["" if self._begun else self._form.head, *map(self._form.text, results)])
        )
        self._begun = True
        return ()

    def finish(self) -> None:
        """Do nothing: every row is written already."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


class FileSink:
    """A `Sink` that is a file ``F``, which appears whole.

    Rows go to ``F.part``, which becomes ``F`` at the end. A later run reads back the rows that a
    killed one has left there, and goes on behind them; not with ``restart``. With ``reuse`` it does
    the same with the rows of a whole ``F`` where these are of the same bundle and rules, and of
    posts of its input.
    """

    def __init__(
        self,
        output: Path,
        form: JsonLines | CsvTable,
        bundle: Bundle,
        rules: str | None,
        *,
        restart: bool,
        reuse: bool,
    ) -> None:
        self._output, self._form, self._bundle, self._rules = output, form, bundle, rules
        self._restart, self._reuse = restart, reuse
        self._part = output.with_name(f"{output.name}.part")
        self._held = ExitStack()
        self._file: BinaryIO | None = None
        # Positions of the rows of each post in `_scores`, which would not fit into memory.
        self._earlier: dict[str, list[int]] = {}
        self._scores: IO[bytes] | None = None
        self._copy_first = False  # rows of a whole file, once there is something to add

    def open(self, input_ids: Callable[[], Counter[str]]) -> None:
        """See `Sink`; of a half-written last row nothing stays."""
        try:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._held.enter_context(self._part.open("ab+", buffering=0))
            self._lock(self._file)
            if self._restart:
                self._file.truncate(0)
                return
            _cut_half_row(self._file, self._form.end)
            if self._part.stat().st_size:
                self._take_over(self._part, input_ids)
            elif self._reuse and self._output.exists():
                with suppress(ConfigError):  # of something else: it is made again, and replaced
                    self._take_over(self._output, input_ids)
                    self._copy_first = True
        except OSError as error:
            raise self._unwritable(error) from error

    def written(self, post_ids: Sequence[str]) -> Sequence[Earlier | None]:
        """See `Sink`; a post that the input names twice is written twice."""
        return [self._take(post_id) for post_id in post_ids]

    def write(self, results: Sequence[Result]) -> Sequence[Bad]:
        # Of a post whose ID only its feature file knows, it comes out here that it is written.
        new = [result for result in results if self._take(result.post_id) is None]
        if new or not self._copy_first:
            self._append("".join(map(self._form.text, new)))
        return ()

    def finish(self) -> None:
        if self._copy_first:
            return  # nothing was added to the whole file
        self._append("")
        try:
            sync_file(self._part)
            publish(self._part, self._output)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self._file is not None and not os.fstat(self._file.fileno()).st_size:
            self._part.unlink(missing_ok=True)
        self._file = None
        self._held.close()

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held the lock may have finished, and given the file its name.
            same = self._part.exists() and os.path.samestat(
                os.fstat(file.fileno()), self._part.stat()
            )
        except BlockingIOError:
            same = False
        if not same:
            self._held.close()
            self._file = None
            raise ConfigError(f"{self._output}: another run is writing it")

    def _take_over(self, path: Path, input_ids: Callable[[], Counter[str]]) -> None:
        """Read rows back, if they are what this run would write."""
        earlier: dict[str, list[int]] = {}
        names = self._form.key(self._bundle.name), self._bundle.version
        scores = self._held.enter_context(TemporaryFile(dir=self._output.parent))  # noqa: SIM115
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for number, row in enumerate(self._form.rows(file)):
                    if (row.model, row.version) != names:
                        made_by = f"{row.model} {row.version}, now {names[0]} {names[1]}"
                        raise ValueError(f"was started with another bundle ({made_by})")
                    if row.rules != self._rules:
                        made_by = f"{row.rules or 'none'}, now {self._rules or 'none'}"
                        raise ValueError(f"was started with other rules for tags ({made_by})")
                    earlier.setdefault(row.key, []).append(number)
                    if row.scores is not None:
                        scores.write(np.asarray(row.scores, np.float64).tobytes())
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {one_line(error)}: use --restart to start over") from error
        ids = input_ids()
        known = Counter({self._form.key(post_id): ids[post_id] for post_id in ids if post_id})
        extra = Counter({key: len(numbers) for key, numbers in earlier.items()}) - known
        if extra.total() > ids[""]:
            raise ConfigError(
                f"{path}: was started with another input: it holds post {next(iter(extra))!r}, "
                "which the input does not: use --restart to start over"
            )
        self._earlier = earlier
        self._scores = scores if scores.tell() else None

    def _take(self, post_id: str) -> Earlier | None:
        numbers = self._earlier.get(self._form.key(post_id))
        if not numbers:
            return None
        number = numbers.pop(0)
        if self._scores is None:
            return Earlier()
        size = 8 * len(self._bundle.labels)
        self._scores.seek(number * size)
        return Earlier(np.frombuffer(self._scores.read(size)))

    def _append(self, text: str) -> None:
        if self._file is None:
            raise RuntimeError("the output is not open")
        try:
            if self._copy_first:
                with self._output.open("rb") as whole:
                    shutil.copyfileobj(whole, self._file)
                self._copy_first = False
            head = "" if os.fstat(self._file.fileno()).st_size else self._form.head
            view = memoryview((head + text).encode("utf-8"))
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._output}: cannot be written: {error}")


def _cut_half_row(file: BinaryIO, end: bytes) -> None:
    if not os.fstat(file.fileno()).st_size:
        return
    with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        last = content.rfind(end)
    file.truncate(0 if last < 0 else last + len(end))
