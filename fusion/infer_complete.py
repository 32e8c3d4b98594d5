"""What is known of an output that is whole, so that the same command does not compute it again.

Beside an output ``F`` lies ``.F.done.json``: what it was made of, what came out, and which file it
was. An output that was changed since, or is made of something else, is no longer what was noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from config.files import write_whole


def note_complete(output: Path, signature: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Note that an output is whole.

    Args:
        output: The file.
        signature: JSON values: what it was made of.
        facts: JSON values: what came out.

    Raises:
        ConfigError: The note cannot be written.
    """
    note = note_of(output)
    try:
        content = {"signature": dict(signature), "facts": dict(facts), "file": _file(output)}
        write_whole(note, json.dumps(content).encode())
    except OSError as error:
        raise ConfigError(f"{note}: cannot be written: {error}") from error


def completed(output: Path, signature: Mapping[str, Any]) -> dict[str, Any] | None:
    """The facts of an output that is whole and made of just this; None where it is not."""
    try:
        content = json.loads(note_of(output).read_text(encoding="utf-8"))
        same = content["signature"] == json.loads(json.dumps(dict(signature)))
        facts = content["facts"] if same and content["file"] == _file(output) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none there, or of another release: it is computed
    return facts if isinstance(facts, dict) else None


def note_of(output: Path) -> Path:
    """Where the note of an output lies."""
    return output.with_name(f".{output.name}.done.json")


def _file(output: Path) -> list[int]:
    found = output.stat()
    return [found.st_size, found.st_mtime_ns]
