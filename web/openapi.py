"""The HTTP interface as an OpenAPI document, and the page that shows it.

`openapi.yaml` is written by hand; a test holds it to the routes, bodies and answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

_FOLDER = Path(__file__).resolve().parent
_METHODS = ("get", "post")


@dataclass(frozen=True)
class Row:
    """A parameter, a key of a body, or a status of an answer.

    Attributes:
        type: A type in words; `schema` names the schema that it refers to.
    """

    name: str
    type: str = ""
    schema: str = ""
    text: str = ""
    required: bool = False


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        bodies: Content types that are read, each with its schema.
    """

    name: str
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[Row, ...]
    bodies: tuple[Row, ...]
    responses: tuple[Row, ...]


@cache
def document() -> Mapping[str, Any]:
    """Return the OpenAPI document."""
    content = yaml.safe_load((_FOLDER / "openapi.yaml").read_text(encoding="utf-8"))
    content["info"]["version"] = version("insighttag")
    return content  # type: ignore[no-any-return]


def groups() -> Iterator[tuple[str, str, list[Operation]]]:
    """Yield the operations by their tags: name, description, operations."""
    for tag in document()["tags"]:
        yield tag["name"], tag["description"], [op for name, op in _all() if name == tag["name"]]


def schemas() -> Iterator[tuple[str, str, list[Row]]]:
    """Yield the schemas of objects: name, description, keys."""
    for name, schema in document()["components"]["schemas"].items():
        if schema["type"] == "object":
            needed = schema.get("required", ())
            rows = [_row(key, each, key in needed) for key, each in schema["properties"].items()]
            yield name, schema["description"], rows


@cache
def page() -> str:
    """Return the page that shows the document."""
    loader = jinja2.FileSystemLoader(_FOLDER)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("openapi.html.j2")
    return template.render(info=document()["info"], groups=list(groups()), schemas=list(schemas()))


def _all() -> Iterator[tuple[str, Operation]]:
    for path, item in document()["paths"].items():
        for method in _METHODS:
            if method in item:
                of_path = item.get("parameters", [])
                yield item[method]["tags"][0], _operation(path, method, item[method], of_path)


def _operation(path: str, method: str, it: Mapping[str, Any], of_path: list[Any]) -> Operation:
    parameters = [
        _row(
            each["name"],
            {**each["schema"], "description": each["description"]},
            "path" in each["in"],
        )
        for each in [*of_path, *it.get("parameters", [])]
    ]
    bodies = it.get("requestBody", {}).get("content", {})
    return Operation(
        name=it["operationId"],
        method=method.upper(),
        path=path,
        summary=it["summary"],
        description=it.get("description", ""),
        parameters=tuple(parameters),
        bodies=tuple(_content(kind, each) for kind, each in bodies.items()),
        responses=tuple(_response(status, each) for status, each in it["responses"].items()),
    )


def _content(kind: str, content: Mapping[str, Any]) -> Row:
    row = _row(kind, content["schema"], True)
    return Row(
        kind, row.type, row.schema, document()["components"]["schemas"][row.schema]["description"]
    )


def _response(status: str, response: Mapping[str, Any]) -> Row:
    if "$ref" in response:
        response = document()["components"]["responses"][response["$ref"].split("/")[-1]]
    kind, content = next(iter(response["content"].items()))
    row = _row(status, content["schema"], True)
    text = row.type if kind == "application/json" else kind
    return Row(status, text, row.schema, response["description"])


def _row(name: str, schema: Mapping[str, Any], required: bool) -> Row:
    kind, refers_to = _type(schema)
    return Row(name, kind, refers_to, schema.get("description", ""), required)


def _type(schema: Mapping[str, Any]) -> tuple[str, str]:
    """Return a type in words, and the name of the schema that it refers to."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return name, name
    if "anyOf" in schema:
        kinds = [_type(each) for each in schema["anyOf"]]
        return " or ".join(kind for kind, _ in kinds), next(name for _, name in kinds if name)
    if "enum" in schema:
        return " | ".join(str(each) for each in schema["enum"]), ""
    types: list[str] = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    inner = schema.get("items") or schema.get("additionalProperties") or {}
    if types[0] in ("array", "object") and inner:
        kind, name = _type(inner)
        return f"{'list' if types[0] == 'array' else 'mapping'} of {kind}", name
    kind = " or ".join("file" if schema.get("format") == "binary" else each for each in types)
    limits = [str(schema[each]) for each in ("minimum", "maximum") if each in schema]
    return f"{kind}{', ' if limits else ''}{' to '.join(limits)}", ""
