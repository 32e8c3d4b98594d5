"""Load settings: YAML, then environment, then ``--set a.b=c``; each mistake is one line.

Precedence, lowest first: defaults, the YAML file, ``INSIGHTTAG_SECTION__KEY`` variables, ``--set``.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from common.errors import ConfigError, one_line, path_told, replaced, told
from common.files import read_text
from common.urls import redact
from config.presets import changes_nothing, merge, with_preset
from config.settings import Settings

CONFIGS = Path(__file__).parent
"""Folder of the files of settings that come with the code."""
DEFAULT_CONFIG = Path("config/infer_config_e2e.yaml")
_VARIABLES = "INSIGHTTAG_"
_TEST_VARIABLES = "INSIGHTTAG_TEST_"
# Keys of features.* and fusion that may be paths.
_PATHS = ("weights", "tfidf", "bundle")
# PyYAML raises the last two itself: for dates such as 2026-13-01, and for nesting without end.
_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ConfigError when the file is missing or holds something else."""
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except _NO_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_mistake(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, not a {type(content).__name__}")
    return content


def _yaml_mistake(error: Exception) -> str:
    """Return the position and the problem, without the line itself: it may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return one_line(error)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn ``a.b=c`` strings into a nested mapping; values are read as YAML.

    ``a.b=@FILE`` takes the content of a file: other users of the host see command lines.
    """
    _hide_passwords()
    tree: dict[str, Any] = {}
    for override in overrides:
        path, separator, raw = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"--set {redact(override)}: write it as section.key=value")
        with replaced(ConfigError(f"--set {path}: {redact(raw)!r:.200} is not a value"), *_NO_YAML):
            value = _file_content(path, raw[1:]) if raw[:1] == "@" else yaml.safe_load(raw or '""')
        node = tree
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {redact(override)}: {key} already has a value")
            node = child
        node[keys[-1]] = value
    return tree


def _file_content(key: str, name: str) -> str:
    what = f"--set {key}: @{name} cannot be read"
    with path_told(what), told(what, UnicodeDecodeError):
        return Path(name).read_text(encoding="utf-8").strip()


def _hide_passwords() -> None:
    """Show this process with the passwords of its command line hidden, in `ps` and in /proc."""
    words = [redact(word) for word in sys.argv]
    if words != sys.argv:
        from setproctitle import setproctitle

        setproctitle(" ".join([sys.executable, *words]))


def _layer(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return one source's values with its preset of encoders written out."""
    if changes_nothing(values.get("features")):
        raise ConfigError(
            f"{source}: features.preset: changes nothing, since the arch of video, image, audio "
            "and text next to it name other encoders: delete them, or the preset"
        )
    features = with_preset(values.get("features"))
    return {**values, "features": features} if "features" in values else dict(values)


def _environment() -> dict[str, Any]:
    known = set(Settings.model_fields)
    for name in os.environ:
        if not name.startswith(_VARIABLES) or name.startswith(_TEST_VARIABLES):
            continue
        section = name[len(_VARIABLES) :].split("__")[0].lower()
        if section not in known:
            raise ConfigError(
                f"environment {name}: no section {section!r}{did_you_mean(section, known)}"
            )
    model: Any = Settings  # no BaseSettings, which would read the sources by itself
    try:
        return EnvSettingsSource(model, env_prefix=_VARIABLES, env_nested_delimiter="__")()
    except Exception as error:  # pydantic-settings raises its own type on undecodable JSON
        raise ConfigError(f"environment: {one_line(error)}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the nearest known word as the end of an error message, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    for key in path:
        info = model.model_fields.get(str(key))
        annotation = info.annotation if info else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return set()
        model = annotation
    return set(model.model_fields)


def validation_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake of a validation error with its key's path, in one line."""
    first = error.errors(include_url=False)[0]
    location = _keys(first)
    path = ".".join(str(part) for part in location) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{path}: unknown key{did_you_mean(str(location[-1]), known)}"
    if first["type"] == "missing":
        return f"{path}: is required"
    message = first["msg"].removeprefix("Value error, ")
    shown = first.get("input")
    if isinstance(shown, (str, int, float, bool)) and "url" not in path:
        # A URL with its password may have been written where its section belongs.
        shown = redact(shown) if isinstance(shown, str) else shown
        message = f"{message} (got {shown!r})"
        if first["type"] == "literal_error":
            message += did_you_mean(str(shown), re.findall("'([^']*)'", first["ctx"]["expected"]))
    more = len({_keys(each) for each in error.errors(include_url=False)}) - 1
    return f"{path}: {message}" + (f" (and {more} more)" if more else "")


def _keys(mistake: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Return where a mistake is, without pydantic's names of the kinds that a value may have."""
    return tuple(part for part in mistake["loc"] if not str(part).startswith("literal["))


def validate(model: type[Model], values: Mapping[str, Any], source: str) -> Model:
    """Validate a mapping; ConfigError names source, key and mistake in one line."""
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"{source}: {odd!r}: unknown key")
    if values.get("workers") == "auto":  # takes the place of a section in a lower layer
        values = {**values, "workers": {}}
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {validation_line(error, model)}") from error


def load_settings(
    path: Path | str | None = None, overrides: Iterable[str] = (), *, default: Path = DEFAULT_CONFIG
) -> Settings:
    """Load the daemon's settings; ConfigError names the file or variable, the key and the mistake.

    Without a path the file is ``default``, and absent it gives the built-in defaults.
    """
    file = Path(path) if path is not None else default
    named = file if path is not None or file.exists() else None
    return settings_with(named, parse_overrides(overrides), "--set")


def settings_with(file: Path | None, values: Mapping[str, Any], source: str) -> Settings:
    """Return the settings of a file and the environment, with the values of a source over them."""
    from_file = read_yaml(file) if file is not None else {}
    validate(Settings, from_file, str(file))  # so that a mistake is blamed on the right source
    if file is not None:
        from_file = beside(from_file, file.absolute().parent)
    merged = merge(_layer(from_file, str(file)), _layer(_environment(), "environment"))
    validate(Settings, merged, "environment")
    return validate(Settings, merge(merged, _layer(values, source)), source)


def beside(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a file's values with those relative paths whole that lead from its folder to a file.

    The folder of a training can so be moved; other paths are relative to the working directory.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result[key] = beside(value, folder)
        elif key in _PATHS and isinstance(value, str) and _lies(folder, value):
            result[key] = str(folder / value)
        else:
            result[key] = value
    return result


def _lies(folder: Path, name: str) -> bool:
    if name in ("pretrained", "package"):
        return False
    try:
        return (folder / name).exists()
    except (OSError, ValueError):  # too long, or with a null byte: the reader says so
        return False


def settings_beside(bundle: Path) -> Path | None:
    """Return the ``settings.yaml`` that `insighttag train` has written next to a bundle."""
    file = bundle.absolute().parent / "settings.yaml"
    return file if file.is_file() else None


def nested(values: Mapping[str, object], source: str) -> dict[str, Any]:
    """Return settings given as ``{"a.b": c}``, nested."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: must be a dict like {{'section.key': value}}: got {values!r}")
    result: dict[str, Any] = {}
    for path, value in values.items():
        if not isinstance(path, str) or not all(path.split(".")):
            raise ConfigError(f"{source}: {path!r}: write it as 'section.key'")
        inner: Any = str(value) if isinstance(value, PurePath) else value
        inner = nested(inner, source) if isinstance(inner, Mapping) else inner
        for key in reversed(path.split(".")):
            inner = {key: inner}
        result = merge(result, inner)
    return result


def given_options(options: object, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return nested settings out of the options that are set; ``keys`` maps options to keys."""
    values = {key: getattr(options, name) for name, key in keys.items()}
    return parse_overrides(f"{key}={value}" for key, value in values.items() if value is not None)


def layered(
    model: type[Model], path: Path | None, default: Path, options: dict[str, Any], sets: list[str]
) -> Model:
    """Return settings out of a YAML file, then options, then ``--set``; each is checked."""
    file = path or default
    from_file = read_yaml(file) if path is not None or file.exists() else {}
    validate(model, from_file, str(file))  # so that a mistake is blamed on the right source
    validate(model, merge(from_file, options), "options")
    return validate(model, merge(from_file, options, parse_overrides(sets)), "--set")
