"""The page of the HTTP interface, from the OpenAPI document that the server returns."""

from __future__ import annotations

from collections.abc import Sequence

from tables import table

from web import openapi
from web.openapi import Row


def page() -> str:
    """Return the page in Markdown."""
    info = openapi.document()["info"]
    parts = [
        "# HTTP interface",
        f"{info['description']} The server has this page at `/docs`, and the OpenAPI 3.1 document "
        "that it shows at `/openapi.json`.",
    ]
    for name, description, operations in openapi.groups():
        parts += [f"## {name}", description]
        for each in operations:
            parts += [f"### {each.method} {each.path}", f"{each.summary}. {each.description}"]
            parts += _table("parameter", each.parameters)
            parts += _table("body", each.bodies)
            parts += _table("answer", each.responses)
    parts.append("## Schemas")
    for name, description, rows in openapi.schemas():
        parts += [f"### {name}", description, *_table("key", rows)]
    return "\n\n".join(parts) + "\n"


def _table(head: str, rows: Sequence[Row]) -> list[str]:
    known = {name for name, _, _ in openapi.schemas()}
    cells = []
    for row in rows:
        kind = row.type
        if row.schema in known:
            kind = kind.replace(row.schema, f"[{row.schema}](#{row.schema.lower()})")
        needed = ", required" if row.required and head in ("parameter", "key") else ""
        cells.append((f"`{row.name}`", f"{kind}{needed}", row.text))
    return [table((head, "type", "meaning"), cells)] if rows else []
