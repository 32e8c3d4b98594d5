"""Options of the training and inference scripts: a YAML file, then options, then ``--set``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from config.load import merge, parse_overrides, read_yaml, validate

Chosen = TypeVar("Chosen", bound=BaseModel)


def given_options(options: object, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return nested settings out of the options that are set; ``keys`` maps options to keys."""
    values = {key: getattr(options, name) for name, key in keys.items()}
    return parse_overrides(f"{key}={value}" for key, value in values.items() if value is not None)


def layered(
    model: type[Chosen], path: Path | None, default: Path, given: dict[str, Any], sets: list[str]
) -> Chosen:
    """Return settings out of a YAML file, then options, then ``--set``; each is checked by itself.

    Raises:
        ConfigError: One line that names the file or option, the key and the mistake.
    """
    file = path or default
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    validate(model, from_file, str(file))  # so that a mistake is blamed on the right source
    validate(model, merge(from_file, given), "options")
    return validate(model, merge(from_file, given, parse_overrides(sets)), "--set")
