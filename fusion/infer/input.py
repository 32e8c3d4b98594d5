"""Input of `infer_net.py`: posts of a JSON list, JSON lines or a text list, one at a time.

The file is read twice: `Input.count` checks every entry before any model is loaded, then posts
are given one by one, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from common.errors import ConfigError, one_line
from config.labels import LabelMap
from fusion.data.data_file import Record, beside, entries, record_of


class Labelled(Protocol):
    """A post to tag, of either kind: features on disk, or raw media."""

    @property
    def post_id(self) -> str:
        """Return the post's ID; empty where only its feature file knows it."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """Return the names of its true tags; empty where they are not known."""
        ...


P = TypeVar("P", bound=Labelled)


@dataclass(frozen=True)
class Bad:
    """A post that cannot be tagged.

    Attributes:
        post_id: Its ID, or where it stands in the input.
    """

    post_id: str
    reason: str


@dataclass(frozen=True)
class Input(Generic[P]):
    """The posts of a file, for any number of readings.

    Attributes:
        read: Makes a post of an entry, the file, and the entry's place in it; raises
            `ConfigError`.
        labels: Names that labels must have.
        skip_bad: Give what is wrong as `Bad`; otherwise it is raised.
    """

    path: Path
    read: Callable[[Any, Path, str], P]
    labels: LabelMap
    skip_bad: bool = False

    def count(self) -> int:
        """Read everything once; return the number of entries, bad ones included.

        Raises:
            ConfigError: The file is missing, broken or empty; or, without ``skip_bad``, an entry
                is wrong.
        """
        found = sum(1 for _ in self)
        if not found:
            raise ConfigError(f"{self.path}: holds no posts")
        return found

    def __iter__(self) -> Iterator[P | Bad]:
        """Yield every post, or `Bad` for an entry that is none; raises as `count`."""
        for where, content in _raw_entries(self.path):
            try:
                post = self.read(content, self.path, where)
                self.labels.encode(post.labels, where=f"{self.path}: post {post.post_id}")
            except ConfigError as error:
                if not self.skip_bad:
                    raise
                name = content.get("post_id") if isinstance(content, dict) else None
                yield Bad(name if isinstance(name, str) and name else where, one_line(error))
            else:
                yield post


def read_record(content: Any, path: Path, where: str) -> Record:
    """Return a post with features: an entry of a data file, or a line of a list.

    Raises:
        ConfigError: It is not as it should be; names ``where``.
    """
    if path.suffix != ".txt":
        return record_of(content, where, path)
    if not content.endswith(".safetensors"):
        return Record(content)
    return Record("", features=beside(content, path))


def _raw_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of an entry and its content; a `ConfigError` for a line that is no JSON."""
    if path.suffix not in (".json", ".jsonl", ".txt"):
        raise ConfigError(
            f"{path}: must be a .json data file or a .txt list (or .jsonl, a post a line)"
        )
    if path.suffix != ".txt":
        yield from ((entry.where, entry.value) for entry in entries(path))
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {number}", line.strip()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
