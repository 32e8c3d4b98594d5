"""Stages that are skipped when they were done before, from the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_whole


def digest(*parts: Any) -> str:
    """Return a hex digest of JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def source_digest(*folders: Path) -> str:
    """Return a digest of the Python files of some folders: other code, other outputs."""
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return digest([(file.name, file.read_text(encoding="utf-8")) for file in files])


@dataclass(frozen=True)
class Stamp:
    """A note of what a stage's outputs were made from.

    Attributes:
        path: The note's file; written last, so that half an output has none.
        inputs: Digest of everything that the outputs follow from.
        outputs: Files and folders that must be there.
    """

    path: Path
    inputs: str
    outputs: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, stage: str, inputs: str, outputs: Iterable[Path]) -> Stamp:
        """Return the stamp of a stage."""
        return cls(folder / f"{stage}.json", inputs, tuple(outputs))

    @property
    def valid(self) -> bool:
        """Tell whether the stage ran from these inputs and its outputs still exist."""
        try:
            noted = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        same = isinstance(noted, dict) and noted.get("inputs") == self.inputs
        return same and all(output.exists() for output in self.outputs)

    def clear(self) -> None:
        """Forget that the stage was done: its outputs are about to change."""
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Note that the stage is done."""
        write_whole(self.path, json.dumps({"inputs": self.inputs}) + "\n")
