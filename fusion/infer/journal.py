"""How far an inference has come, so that a killed one goes on where it stopped.

Beside an output ``F`` lie, until it is whole: ``F.part`` what is written so far, ``F.part.scores``
the scores of labelled posts, ``F.part.skipped`` what was left out, and ``F.part.json`` how much of
each counts. The last is replaced in one step when a batch is written; what a killed run has
written beyond it is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeAlias

from common.errors import ConfigError
from common.files import publish, sync_file

Kind: TypeAlias = Literal["part", "scores", "skipped"]
_KINDS: tuple[Kind, ...] = ("part", "scores", "skipped")


class Journal:
    """The files of one run; use with ``with``.

    Args:
        base: What is made; the files' names begin with it.
        signature: JSON values that must be equal for a run to go on with what another has left.
        restart: Throw away what is there.

    Attributes:
        done: Entries of the input whose results are written.
        posts: Those that were tagged.
        restart: As given.
    """

    def __init__(self, base: Path, signature: Mapping[str, Any], *, restart: bool = False) -> None:
        self.done = self.posts = 0
        self.restart = restart
        self._base = base
        self._signature = json.loads(json.dumps(signature))
        self._files: dict[Kind, IO[bytes]] = {}
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        """Take over what a killed run has left.

        Raises:
            ConfigError: Another run is at it, what was left is of another run or release, or the
                folder cannot be written.
        """
        try:
            self._base.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._path("lock").open("wb")
            self._take_over(self._lock)
        except OSError as error:
            self._unlock()
            raise self._unwritable(error) from error
        except ConfigError:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the files as they are; what was not finished can go on."""
        if self.done == 0:
            self._forget()
        self._path("lock").unlink(missing_ok=True)
        self._unlock()

    def path(self, kind: Kind) -> Path:
        """Where a file lies while the run lasts."""
        return self._path("" if kind == "part" else kind)

    def write(self, kind: Kind, content: bytes) -> None:
        """Append to a file; counts with the next `commit`.

        Raises:
            ConfigError: The disk is full, or the like.
        """
        try:
            view = memoryview(content)
            while view:
                view = view[self._files[kind].write(view) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def commit(self, entries: int, posts: int) -> None:
        """So many more entries are done, so many posts of them tagged, and all is written."""
        self.done += entries
        self.posts += posts
        content = {
            "signature": self._signature,
            "done": self.done,
            "posts": self.posts,
            "sizes": {kind: os.fstat(file.fileno()).st_size for kind, file in self._files.items()},
        }
        part = self._path("json.new")
        try:
            part.write_text(json.dumps(content), encoding="utf-8")
            part.replace(self._path("json"))
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self, output: Path | None, skipped: Path) -> None:
        """Everything is done: the files get their names.

        Args:
            output: What ``part`` becomes; None throws it away.
            skipped: What ``skipped`` becomes where it holds anything.

        Raises:
            ConfigError: They cannot be written.
        """
        try:
            if output is not None:
                sync_file(self.path("part"))
                publish(self.path("part"), output)
            if self.path("skipped").stat().st_size:
                self.path("skipped").replace(skipped)
            elif skipped.exists():
                skipped.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        self._forget()

    def _take_over(self, lock: IO[bytes]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{self._base}: another run is writing it") from error
        sizes = self._left()
        for kind in _KINDS:
            file = self.path(kind).open("ab", buffering=0)
            self._files[kind] = file
            file.truncate(sizes.get(kind, 0))

    def _unlock(self) -> None:
        for file in (*self._files.values(), self._lock):
            if file is not None:
                file.close()

    def _left(self) -> dict[Kind, int]:
        """Sizes of the files that a killed run has left, all 0 where there was none."""
        try:
            found = json.loads(self._path("json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        if self.restart:
            return {}
        try:
            sizes = {kind: int(found["sizes"][kind]) for kind in _KINDS}
            was, done, posts = dict(found["signature"]), int(found["done"]), int(found["posts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._path('json')}: was left by another release of this program: "
                "begin anew with --restart"
            ) from error
        there = {kind: self.path(kind) for kind in _KINDS}
        if any(not path.exists() or path.stat().st_size < sizes[k] for k, path in there.items()):
            return {}  # cut short by a power failure, or finished
        now = self._signature
        if now.get("skip_bad") is True and was.get("skip_bad") is False:
            was["skip_bad"] = True  # what is done held no bad post: it is the same either way
        key = next((k for k in {**was, **now} if was.get(k) != now.get(k)), None)
        if key is not None:
            raise ConfigError(
                f"{self.path('part')}: was begun with another {key} ({was.get(key)}, now "
                f"{now.get(key)}): go on with that one, or begin anew with --restart"
            )
        self.done, self.posts = done, posts
        return sizes

    def _forget(self) -> None:
        for name in ("json", "json.new", "", "scores", "skipped"):
            self._path(name).unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return self._base.with_name(f"{self._base.name}.part{suffix and '.'}{suffix}")

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._base}: cannot be written: {error}")
