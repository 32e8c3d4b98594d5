"""``insighttag publish``: put posts on the queue."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from config.errors import ConfigError, MessageError
from config.settings import Settings
from scripts.commands.common import Config, Overrides, online_settings


def publish(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="IDs of posts.")] = None,
    *,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="F", help="A file with one ID a line; - is standard input."),
    ] = None,
    untagged: Annotated[
        bool, typer.Option("--untagged", help="Every post of the database without a result.")
    ] = False,
    priority: Annotated[
        int, typer.Option("--priority", min=0, max=9, help="0 to 9; higher is served sooner.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Tag again what this bundle has tagged already.")
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Put posts on the queue.

    By ID, from a file with one ID a line, or all posts of the database that have no result yet.
    """
    from king.messages import PostMessage
    from king.publisher import publish_posts

    named = list(ids or ())
    if file is not None:
        named += read_ids(file)
    if not (named or file or untagged):
        raise ConfigError("publish: name IDs, --file F or --untagged")
    checked = [_checked(post_id) for post_id in named]  # all of them, before any is published
    settings = online_settings(config, overrides)
    with _untagged(settings, untagged) as more:
        messages = (
            PostMessage(post_id, priority=priority, force=force)
            for post_id in _once(chain(checked, more))
        )
        count = publish_posts(settings.broker, messages)
    sys.stdout.write(f"published {count} to {settings.broker.queue}\n")


def read_ids(file: Path) -> list[str]:
    """One ID a line; empty lines are left out."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"--file {file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {file}: cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _checked(post_id: str) -> str:
    """The ID as the daemon will read it."""
    from king.messages import PostMessage, parse_message

    try:
        return parse_message(PostMessage(post_id).encode()).post_id
    except (MessageError, UnicodeEncodeError) as error:
        raise ConfigError(f"publish: {post_id!r:.80}: {error}") from error


@contextlib.contextmanager
def _untagged(settings: Settings, wanted: bool) -> Iterator[Iterator[str]]:
    """IDs without a result, read from the database while they are being published."""
    from king.archive import Archive

    if not wanted:
        yield iter(())
        return
    archive = Archive(settings.store)
    try:
        yield archive.untagged_ids()
    finally:
        archive.close()


def _once(ids: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for post_id in ids:
        if post_id not in seen:
            seen.add(post_id)
            yield post_id
