"""What is known of an output that is whole, so that the same command does not compute it again.

Beside an output ``F`` lies ``.F.done.json``: what it was made of, what came out, and which file it
was. An output that was changed since, or is made of something else, is no longer what was noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from common.errors import ConfigError
from common.files import write_whole


class Made(BaseModel):
    """What came out: see `fusion.infer.inference.InferReport`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    posts: int
    labelled: int
    metrics: dict[str, float]
    skipped: int


def note_complete(output: Path, signature: Mapping[str, Any], made: Made) -> None:
    """Note that an output is whole.

    Args:
        output: The file.
        signature: JSON values: what it was made of.
        made: What came out.

    Raises:
        ConfigError: The note cannot be written.
    """
    note = note_of(output)
    try:
        content = {
            "signature": dict(signature),
            "facts": made.model_dump(),
            "file": _file(output),
        }
        write_whole(note, json.dumps(content).encode())
    except OSError as error:
        raise ConfigError(f"{note}: cannot be written: {error}") from error


def completed(output: Path, signature: Mapping[str, Any]) -> Made | None:
    """What came out, of an output that is whole and made of just this; None where it is not."""
    try:
        content = json.loads(note_of(output).read_text(encoding="utf-8"))
        same = content["signature"] == json.loads(json.dumps(dict(signature)))
        if not same or content["file"] != _file(output):
            return None
        return Made.model_validate(content["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none there, or of another release: it is computed


def note_of(output: Path) -> Path:
    """Where the note of an output lies."""
    return output.with_name(f".{output.name}.done.json")


def _file(output: Path) -> list[int]:
    found = output.stat()
    return [found.st_size, found.st_mtime_ns]
