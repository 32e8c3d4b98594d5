"""``insighttag retag``: have posts tagged again, by the bundle that is served now."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import complain, flag, option, print_json, say
from common.errors import ConfigError
from common.progress import track
from config.settings import Settings
from config.tag_rules import TagRules
from fusion.bundle.folder import newest_version
from scripts.commands.common import AsJson, Config, Overrides, Priority, listed, online_settings
from scripts.commands.publish import read_messages

if TYPE_CHECKING:
    from king.messages import PostMessage
    from king.store.queries import PostQueries

Partial = Annotated[
    bool,
    flag(
        "--partial",
        "Of these, the posts whose tags lack something that may be available now: their "
        "media host was down, or this host was short of disk or descriptors.",
    ),
]
OtherRules = Annotated[
    bool,
    flag(
        "--other-rules",
        "Of these, the posts that were tagged under other rules than those of "
        "fusion.min_tags, max_tags and tags now.",
    ),
]


def retag(
    *,
    query: Annotated[
        str | None, option("Posts that match: a MongoDB filter, extended JSON.", "JSON")
    ] = None,
    file: Annotated[
        Path | None, option("A file with one ID a line; - is standard input.", "F")
    ] = None,
    everything: Annotated[bool, flag("--all", "Every post of the database.")] = False,
    older: Annotated[
        str | None,
        option(
            "Of these, the posts that an older bundle has tagged: current is the version in "
            "fusion.bundle.",
            "V",
            "--bundle-older-than",
        ),
    ] = None,
    partial: Partial = False,
    other_rules: OtherRules = False,
    limit: Annotated[int | None, option("At most this many posts.", min=1)] = None,
    priority: Priority = 0,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Put posts on the queue to be tagged again.

    With a feature cache (cache.url) nothing is downloaded and extracted again.
    """
    if sum((query is not None, file is not None, everything)) > 1:
        raise ConfigError("retag: --query, --file and --all exclude one another")
    if not (query or file or everything or older or partial or other_rules):
        raise ConfigError(
            "retag: name --query JSON, --file F, --all, --bundle-older-than V, --partial or "
            "--other-rules"
        )
    from corpus.pull.command import read_query
    from king.broker.connect import publish_posts
    from king.messages import PostMessage
    from king.store.client import all_of
    from king.store.queries import open_queries

    named = read_messages(file) if file is not None else None
    settings = online_settings(config, overrides, broker=True, store=True)
    conditions = [read_query(query or "{}"), *_conditions(settings, older, partial, other_rules)]
    condition = all_of(*filter(None, conditions)) if any(conditions) else {}
    with open_queries(settings.store) as queries:
        total = None
        if named is not None:
            known = _known(settings, queries, named)
            ids: Iterator[str] = islice(queries.among(known, condition), limit)
        else:
            total = min(queries.matching(condition), limit or sys.maxsize)
            ids = queries.matching_ids(condition, limit)
        # Priority and force are this command's, not those of the file.
        messages = (PostMessage(post_id, priority=priority, force=True) for post_id in ids)
        count = publish_posts(settings.broker, track(messages, "posts", total))
    if as_json:
        print_json({"published": count, "queue": settings.broker.queue})
    else:
        say(f"retagging {count} posts through {settings.broker.queue}\n")


def _known(settings: Settings, queries: PostQueries, messages: list[PostMessage]) -> list[str]:
    """Return the IDs of messages, after a warning that names those without a post."""
    post_ids = [each.post_id for each in messages]
    if unknown := queries.unknown(post_ids):
        where = f"{settings.store.database}.{settings.store.collection}"
        complain("insighttag", f"retag: not in {where}: {listed(unknown)}", 0)
    return post_ids


def _conditions(
    settings: Settings, older: str | None, partial: bool, other_rules: bool
) -> Iterator[dict[str, Any]]:
    """Yield the filters of --bundle-older-than, --partial and --other-rules."""
    result = settings.store.result_path
    if older is not None:
        version = current_version(settings) if older == "current" else _version(older)
        yield {f"{result}.version": {"$lt": version}}
    if partial:
        yield {f"{result}.partial": True}
    if other_rules:
        rules = TagRules.read(settings.fusion).digest
        differ = {"$ne": rules} if rules is not None else {"$exists": True}
        yield {f"{result}.status": "tagged", f"{result}.rules": differ}


def _version(text: str) -> str:
    """Check a bundle's version or its beginning; versions sort as text."""
    if not re.fullmatch(r"\d{8}(T\d{6}Z(-[0-9a-f]{8})?)?", text):
        raise ConfigError(
            f"retag: --bundle-older-than {text!r} is not a version: current, or e.g. 20260131"
        )
    return text


def current_version(settings: Settings) -> str:
    """Return the version of the bundle in ``fusion.bundle``."""
    version = newest_version(settings.fusion.bundle)
    if version is None:
        raise ConfigError(
            f"fusion.bundle: {settings.fusion.bundle} holds no bundle whose version can be read: "
            "name a version"
        )
    return version
