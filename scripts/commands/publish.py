"""``insighttag publish``: put posts on the queue."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.cli import complain, flag, option, print_json, say
from common.errors import ConfigError, MessageError, StoreUnavailable, told
from common.files import read_text
from config.settings import Settings
from scripts.commands.common import (
    AsJson,
    Config,
    Ids,
    Overrides,
    Priority,
    listed,
    online_settings,
)

if TYPE_CHECKING:
    from king.messages import PostMessage

_NAMED = 5
# Without --check at most this many IDs are looked up: one query or two. At double, a slow
# database delays the command noticeably.
_MAX_CHECKED = 1000
_CHECK_TIMEOUT_S = 3.0


def publish(
    ids: Ids = None,
    *,
    file: Annotated[
        Path | None,
        option(
            'A file with one ID a line, or {"post_id": "…"} with priority and force as on the '
            "queue; - is standard input.",
            "F",
        ),
    ] = None,
    untagged: Annotated[
        bool, flag("--untagged", "Every post of the database without a result.")
    ] = False,
    priority: Priority = 0,
    force: Annotated[
        bool, flag("--force", "Tag again what this bundle has tagged already.")
    ] = False,
    check: Annotated[
        bool | None,
        option(
            "Publish nothing if an ID is not in the database; with neither option, such IDs are "
            "only reported, and only if there are at most 1,000.",
            None,
            "--check/--no-check",
        ),
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Put posts on the queue.

    By ID, from a file with one ID a line, or all posts of the database that have no result yet.
    """
    from king.broker.connect import publish_posts
    from king.messages import PostMessage
    from king.store.queries import open_queries

    # All of them are checked before any is published.
    named = [_checked(post_id) for post_id in ids or ()]
    if file is not None:
        named += read_messages(file)
    if not (named or file or untagged):
        raise ConfigError("publish: name IDs, --file F or --untagged")
    if not (named or untagged):
        raise ConfigError(f"--file {file}: holds no ID; write one a line")
    store = untagged or bool(check)
    settings = online_settings(config, overrides, broker=True, store=store)
    once = _once(named)
    if check:
        _check(settings, list(once), refuse=True)
    with contextlib.ExitStack() as stack:
        others: Iterable[PostMessage] = ()
        if untagged:
            queries = stack.enter_context(open_queries(settings.store))
            others = (PostMessage(i) for i in queries.untagged_ids() if i not in once)
        asked = (
            replace(each, priority=each.priority or priority, force=each.force or force)
            for each in chain(once.values(), others)
        )
        count = publish_posts(settings.broker, asked)
    if as_json:
        print_json({"published": count, "queue": settings.broker.queue})
    else:
        say(f"published {count} to {settings.broker.queue}\n")
    if check is None and len(once) <= _MAX_CHECKED:
        _check(settings, list(once), refuse=False)


def _check(settings: Settings, post_ids: Sequence[str], *, refuse: bool) -> None:
    """Name the IDs without a post; ``refuse`` them, or go on, also without a database."""
    from deploy.embedded import SCHEME, peek
    from king.store.queries import open_queries

    store = peek(settings).store
    if not post_ids or store.url.startswith(SCHEME):
        return  # the embedded database does not run, and is not started for a warning
    if not refuse:
        timeout_s = min(store.timeout_s, _CHECK_TIMEOUT_S)
        store = store.model_copy(update={"timeout_s": timeout_s})
    try:
        with open_queries(store) as queries:
            unknown = queries.unknown(post_ids)
    except StoreUnavailable as error:
        if refuse:
            raise
        complain("insighttag", f"publish: the IDs were not checked: {error}", 0)
        return
    if unknown:
        where = f"{store.database}.{store.collection}"
        count = f"{len(unknown)} of {len(post_ids)} IDs"
        what = f"publish: not in {where}: {listed(unknown)} ({count})"
        if refuse:
            raise ConfigError(f"{what}; nothing was published; --no-check publishes them anyway")
        warning = f"{what}; they become dead letters unless their posts arrive in time"
        complain("insighttag", warning, 0)


def read_messages(file: Path) -> list[PostMessage]:
    """Read one message a line, each as the queue would carry it; skip empty lines.

    A bare ID with white space or braces, which a client could publish, is refused here: a line of
    a table or of broken JSON is much likelier.
    """
    messages: list[PostMessage] = []
    wrong: list[str] = []
    # No splitlines: it would take some control characters inside an ID for ends of lines.
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            messages.append(_message(line.strip()))
        except MessageError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        lines = "1 line names" if len(wrong) == 1 else f"{len(wrong)} lines name"
        raise ConfigError(
            f"--file {file}: {lines} no post, so nothing was done: "
            f"{'; '.join(wrong[:_NAMED])}{more}"
        )
    return messages


def _message(line: str) -> PostMessage:
    from king.messages import parse_message

    message = parse_message(line)
    odd = next((c for c in line if c.isspace() or c in "{}"), None)
    if odd is not None and line[0] not in '{"':
        kind = "white space" if odd.isspace() else repr(odd)
        raise MessageError(f'holds {kind}; if it is an ID, write {{"post_id": "…"}}')
    return message


def _text(file: Path) -> str:
    if str(file) != "-":
        return read_text(file, f"--file {file}", encoding="utf-8-sig")
    with told("--file -: cannot be read", OSError, UnicodeDecodeError):
        return sys.stdin.read()


def _checked(post_id: str) -> PostMessage:
    """Check an ID as the daemon will read it."""
    from king.messages import PostMessage, parse_message

    with told(f"publish: {post_id!r:.80}", MessageError, UnicodeEncodeError):
        return parse_message(PostMessage(post_id).encode())


def _once(messages: Iterable[PostMessage]) -> dict[str, PostMessage]:
    """Merge the messages of each post."""
    by_id: dict[str, PostMessage] = {}
    for message in messages:
        earlier = by_id.setdefault(message.post_id, message)
        by_id[message.post_id] = replace(
            earlier,
            priority=max(earlier.priority, message.priority),
            force=earlier.force or message.force,
        )
    return by_id
