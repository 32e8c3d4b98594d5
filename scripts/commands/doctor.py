"""``insighttag doctor``: which of the platform's documents can be read, and where weights are."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from common.cli import say
from common.tables import print_table
from scripts.commands.common import (
    AsJson,
    Config,
    Overrides,
    online_settings,
    print_json,
)
from scripts.commands.weights import about

_FIELDS = ("text", "images", "videos", "audios", "labels")


def doctor(
    posts: Annotated[
        int, typer.Option("--posts", min=1, help="Look at this many of the newest posts.")
    ] = 1000,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Count how the newest posts are read by store.fields: each field, and what does not fit.

    Also say where the weights of each encoder are.
    """
    from extractors.models.catalog import needs
    from king.store.documents import NoIdError, dig, id_text, read_fields
    from king.store.queries import open_queries

    settings = online_settings(config, overrides, store=True)
    fields = settings.store.fields
    found: Counter[str] = Counter()
    unread: Counter[tuple[str, str]] = Counter()
    ids: Counter[str] = Counter()
    total = 0
    with open_queries(settings.store) as queries:
        for document in queries.newest(posts):
            total += 1
            value = dig(document, fields.id)
            try:
                id_text(value)
            except NoIdError as error:
                unread["id", str(error)] += 1
            else:
                ids[type(value).__name__] += 1
            post, left_out = read_fields("", document, fields)
            found.update({f"{media.kind}s" for media in post.media})
            found.update(name for name in ("text", "labels") if getattr(post, name))
            unread.update({(field, shape) for field, _, shape in left_out})
    content: dict[str, Any] = {
        "posts": total,
        "ids": dict(ids),
        "fields": {
            name: {
                "path": getattr(fields, name),
                "posts": found[name],
                "unread": {shape: n for (field, shape), n in unread.items() if field == name},
            }
            for name in ("id", *_FIELDS)
        },
    }
    content["fields"]["id"]["posts"] = sum(ids.values())
    content["weights"] = [about("settings", need) for need in needs(settings.features)]
    if as_json:
        print_json(content)
        return
    say(f"{total} posts of {settings.store.database}.{settings.store.collection}\n")
    types = ", ".join(f"{count} {name}" for name, count in ids.most_common())
    say(f"IDs: {types or 'none'}\n")
    rows = [
        (
            name,
            field["path"],
            field["posts"],
            "\n".join(f"{count} posts: {shape}" for shape, count in field["unread"].items()),
        )
        for name, field in content["fields"].items()
    ]
    print_table("", ("field", "path", "posts that have it", "does not fit"), rows)
    _say_weights(content["weights"])


def _say_weights(weights: list[dict[str, Any]]) -> None:
    say("\n")
    for each in weights:
        missing = f"missing: insighttag weights get {each['encoder']}"
        say(f"{', '.join(each['for'])}: {each['encoder']}: {each['here'] or missing}\n")
