"""``insighttag cache``: what the feature cache holds; make it smaller, or empty."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import flag, option, print_json, say
from common.errors import ConfigError, TaggingError
from common.tables import print_table
from common.urls import redact
from config.settings import Settings
from scripts.commands.common import AsJson, Config, Overrides, settings_of

if TYPE_CHECKING:
    from workers.cache.store import CacheStore

_MIB = 1 << 20


def stats(as_json: AsJson = False, config: Config = None, overrides: Overrides = None) -> None:
    """Count the entries and their size."""
    with _store(config, overrides) as (store, settings):
        usage = store.stats()
    content = {
        "cache": redact(settings.cache.url or ""),
        "entries": usage.entries,
        "bytes": usage.bytes,
        "max_bytes": usage.max_bytes,
    }
    if as_json:
        print_json(content)
        return
    size = f"{usage.bytes / _MIB:.1f} of {usage.max_bytes / _MIB:.0f} MiB"
    rows = [("cache", content["cache"]), ("entries", usage.entries), ("size", size)]
    print_table("", ("field", "value"), rows)


def prune(
    max_mb: Annotated[int | None, option("The new size; default: cache.max_mb.", min=0)] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Delete the entries used least recently, down to a size."""
    with _store(config, overrides) as (store, settings):
        target = settings.cache.max_mb if max_mb is None else max_mb
        _prune(store, target * _MIB)


def clear(
    yes: Annotated[bool, flag("--yes", "Do not ask.")] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Delete every entry."""
    with _store(config, overrides) as (store, settings):
        if not yes:
            where = redact(settings.cache.url or "")
            typer.confirm(f"Delete every entry of {where}?", abort=True, err=True)
        _prune(store, 0)


def _prune(store: CacheStore, max_bytes: int) -> None:
    gone = store.prune(max_bytes)
    say(f"deleted {gone.entries} entries, {gone.bytes / _MIB:.1f} MiB\n")


@contextlib.contextmanager
def _store(
    config: Path | None, overrides: Sequence[str] | None
) -> Iterator[tuple[CacheStore, Settings]]:
    from workers.cache.store import open_store

    settings = settings_of(config, overrides)
    if settings.cache.url is None:
        raise ConfigError("cache.url: is not set, so there is no cache")
    # A command may wait longer than a post does.
    patient = settings.cache.model_copy(update={"timeout_s": max(30.0, settings.cache.timeout_s)})
    store = open_store(patient)
    try:
        yield store, settings
    except TaggingError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise ConfigError(
                f"cache.url: {redact(settings.cache.url)}: is not a folder"
            ) from error
        raise
    finally:
        store.close()


COMMANDS: Mapping[str, Callable[..., None]] = {"stats": stats, "prune": prune, "clear": clear}
