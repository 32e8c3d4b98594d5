"""What is asked for, and how far a pull has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.settings import StoreSettings


@dataclass(frozen=True, slots=True)
class Options:
    """What to pull.

    Attributes:
        store: With the URL as it stands in the settings, ``embedded://`` included.
        query: A MongoDB filter, as it was written: extended JSON.
        since: Oldest time, as it was written; `until` the same, not included itself.
        sample: Posts to pick out of all; None takes all.
        min_posts_per_tag: Tags with fewer posts are left out; 0 leaves out none.
        seed: Another seed, another sample.
        limit: Posts written at most.
        untagged: Only posts without a result.
        page: Documents read at a time.
        restart: Forget an unfinished pull.
    """

    store: StoreSettings
    out: Path
    query: str = "{}"
    since: str | None = None
    until: str | None = None
    sample: int | None = None
    min_posts_per_tag: int = 0
    seed: int = 0
    limit: int | None = None
    untagged: bool = False
    page: int = 1000
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a collection, in the order of ``_id``.

    Attributes:
        bracket: Which type of ``_id`` is being read; `pages` knows the order.
        last: The last ``_id`` that was read; None before the first of its bracket.
    """

    bracket: int = 0
    last: Any = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some documents, and the place behind them."""

    documents: tuple[Mapping[str, Any], ...]
    place: Place
