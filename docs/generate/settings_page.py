"""The pages of settings: every key with its type, default and meaning, from the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo
from tables import table

from config.schema import words_of
from config.section import Section
from config.settings import InferSettings, Settings
from config.train import BackboneTrainSettings, TrainSettings


def page() -> str:
    """Return the page of the settings of daemon, commands and HTTP server."""
    return _joined(
        "# Settings",
        "For the daemon, the HTTP server and the commands: `--config F` names the YAML file, "
        "`INSIGHTTAG_SECTION__KEY` in the environment overrides it, and `--set section.key=value` "
        "overrides both. Unknown keys are refused. Generated from the schema when this site was "
        "built; editors complete and check the file with "
        "[settings.schema.json](schemas/settings.schema.json) "
        "([python.md](python.md#settings-and-data-files-in-an-editor)).",
        *_sections(Settings, "##"),
        "## infer_net.py",
        "For feature files; for raw media it takes the settings above.",
        *_sections(InferSettings, "###"),
    )


def training_page() -> str:
    """Return the page of the settings of `train_net.py`."""
    return _joined(
        "# Settings of training",
        "For `train_net.py`: `--model_config F` names the YAML file; options and "
        "`--set section.key=value` override it. `task` decides which of the two groups applies. "
        "For editors: [train.schema.json](schemas/train.schema.json), "
        "[backbone.schema.json](schemas/backbone.schema.json).",
        "## A fusion model",
        "`task: fusion`, the default.",
        *_sections(TrainSettings, "###"),
        "## A backbone",
        "`task: image_backbone`, `video_backbone`, `audio_backbone` or `text_backbone`.",
        *_sections(BackboneTrainSettings, "###"),
    )


def _joined(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def _sections(model: type[Section], heading: str, path: str = "") -> Iterator[str]:
    """Yield a table of a section's own keys, then the sections in it."""
    own = {name: field for name, field in model.model_fields.items() if not _model(field)}
    nested = {name: it for name, field in model.model_fields.items() if (it := _model(field))}
    if path:
        yield f"{heading} {path}"
        yield _words(model.__doc__ or "").partition("\n\n")[0]
    if own:
        rows = [
            _row(f"{path}.{name}".lstrip("."), name, field, model) for name, field in own.items()
        ]
        yield table(("key", "takes", "default", "meaning"), rows)
    for name, section in nested.items():
        yield from _sections(section, heading, f"{path}.{name}".lstrip("."))


def _row(key: str, name: str, field: FieldInfo, model: type[Section]) -> tuple[str, ...]:
    return f"`{key}`", _type(field), _default(field), _words(words_of(model, name) or "")


def _model(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds; None where it holds a value, a list or a mapping."""
    for each in (field.annotation, *get_args(field.annotation)):
        if isinstance(each, type) and issubclass(each, Section):
            return (
                each
                if each is field.annotation or type(None) in get_args(field.annotation)
                else None
            )
    return None


def _type(field: FieldInfo) -> str:
    text = _named(field.annotation)
    limits = [str(each) for each in field.metadata]
    bounds = re.findall(r"\b(ge|gt|le|lt)=([\d.e-]+)", " ".join(limits))
    signs = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
    return ", ".join([text, *(f"{signs[name]} {value}" for name, value in bounds)])


def _named(annotation: Any) -> str:
    """Return a type in words."""
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "null",
    }
    if annotation in names:
        return names[annotation]
    origin, arguments = getattr(annotation, "__origin__", None), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _named(annotation.__origin__)
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{each}`" for each in arguments)
    if origin in (tuple, list, frozenset, set):
        return f"list of {_named(arguments[0])}" if arguments else "list"
    if origin is dict or "Mapping" in str(origin):
        return "mapping"
    if arguments:
        return " or ".join(_named(each) for each in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return {"Path": "path"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", "value")
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        if any(isinstance(each, Section) for each in value):
            return "one, of defaults"
        return f"`[{', '.join(str(each) for each in value)}]`"
    return f"`{value}`" if str(value) else "empty"


def _words(text: str) -> str:
    """Return a docstring as Markdown in one line for each paragraph."""
    text = text.replace("``", "`")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).replace("\n\n", " ")
