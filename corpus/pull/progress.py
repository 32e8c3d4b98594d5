"""The files of a pull that is not finished, so that it can go on after a kill.

    .NAME.part            posts written so far, and perhaps some lines too many
    .REJECTED.part        the same of the documents that are no posts
    .NAME.pull            how far it has come, and how long the parts were then
    .NAME.choice          which posts are taken, where that had to be counted first

The record is written after the parts are on the disk; on going on they are cut to its lengths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from bson import json_util

from common.errors import ConfigError, replaced
from common.files import part_of, publish, write_whole
from corpus.pull.pages import Position
from corpus.pull.posts import Choice
from corpus.records import Summary


class Files:
    """Output, rejects and record of one pull: position, and what was counted and written up to it.

    Attributes:
        complete: Nothing more is to be read.
        times: Times that were worked out at the beginning, kept for going on.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any]) -> None:
        self.out = out
        self.rejected = out.with_name(f"{out.stem}.rejected.jsonl")
        self.summary_file = out.with_name(f"{out.stem}.summary.json")
        self._record = out.with_name(f".{out.name}.pull")
        self._choice = out.with_name(f".{out.name}.choice")
        self._asked = dict(asked)
        self._parts: list[BinaryIO] = []  # of posts, and of rejects
        self.position = Position()
        self.summary = Summary("Posts")
        self.written = 0
        self.complete = False
        self.times: dict[str, float | None] = {}

    @property
    def begun(self) -> bool:
        return self._record.exists()

    def forget(self) -> None:
        for path in (self._record, self._choice, part_of(self.out), part_of(self.rejected)):
            path.unlink(missing_ok=True)

    def open(self) -> None:
        """Open the parts, at the lengths of the record if there is one."""
        lengths = self._read() if self.begun else [0, 0]
        if self.complete:
            return
        for path, length in zip((self.out, self.rejected), lengths, strict=True):
            self._parts.append(_open(part_of(path), length))

    def write(self, line: str) -> None:
        self._parts[0].write(line.encode("utf-8") + b"\n")
        self.written += 1

    def reject(self, line: str) -> None:
        self._parts[1].write(line.encode("utf-8") + b"\n")

    def save(self, position: Position, *, complete: bool = False) -> None:
        """Record the position, after all posts up to it are on the disk."""
        self.position, self.complete = position, complete
        content = {
            "asked": self._asked,
            "times": self.times,
            "bracket": position.bracket,
            "last": json_util.dumps(position.last, json_options=json_util.CANONICAL_JSON_OPTIONS),
            "lengths": [_synced(part) for part in self._parts],
            "written": self.written,
            "summary": self.summary.as_dict(),
            "complete": complete,
        }
        write_whole(self._record, json.dumps(content, ensure_ascii=False))

    def finish(self) -> None:
        """Publish the files; safe to repeat after a kill."""
        self.close()
        for path in (self.rejected, self.out):
            if part_of(path).exists():
                publish(part_of(path), path)
        self.summary.write(self.summary_file)
        self._choice.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def read_choice(self) -> Choice | None:
        try:
            content = json.loads(self._choice.read_text(encoding="utf-8"))
            rare, extra = frozenset(content.pop("rare")), frozenset(content.pop("extra"))
            return Choice(**content, rare=rare, extra=extra)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def keep_choice(self, choice: Choice) -> None:
        content = asdict(choice) | {"rare": sorted(choice.rare), "extra": sorted(choice.extra)}
        write_whole(self._choice, json.dumps(content, ensure_ascii=False))

    def _read(self) -> list[int]:
        with replaced(
            ConfigError(f"{self._record}: cannot be read; add --restart to start over"),
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):
            content = json.loads(self._record.read_text(encoding="utf-8"))
            asked: dict[str, Any] = content["asked"]
            last = json_util.loads(content["last"])
            self.position = Position(int(content["bracket"]), last)
            self.summary = Summary.of("Posts", content["summary"])
            self.written, self.complete = int(content["written"]), bool(content["complete"])
            self.times = dict(content["times"])
            lengths = list(map(int, content["lengths"]))
        other = sorted(k for k in {*asked, *self._asked} if asked.get(k) != self._asked.get(k))
        if other:
            raise ConfigError(
                f"{self.out}: an unfinished pull with another {', '.join(other)} is there: "
                "repeat its options, or add --restart to start over"
            )
        return lengths


def _open(path: Path, length: int) -> BinaryIO:
    """Open a part for appending, cut to the recorded length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("r+b" if length else "w+b")
    if file.seek(0, os.SEEK_END) < length:
        file.close()
        raise ConfigError(f"{path}: shorter than it was; add --restart to start over")
    file.truncate(length)
    file.seek(length)
    return file


def _synced(file: BinaryIO) -> int:
    file.flush()
    os.fsync(file.fileno())
    return file.tell()
