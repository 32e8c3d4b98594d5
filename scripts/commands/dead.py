"""``insighttag dead``: look at dead letters, replay them, drop them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import flag, option, print_json, say
from common.errors import ConfigError
from common.tables import print_table
from common.times import since_time
from config.settings import Settings
from scripts.commands.common import (
    AsJson,
    Config,
    Ids,
    Overrides,
    PostId,
    listed,
    moment,
    online_settings,
)

if TYPE_CHECKING:
    from king.jobs import Job
    from king.store.queries import PostQueries

Stage = Annotated[
    str | None,
    option(
        "Only those of this stage: message, load, fetch, decode, extract, fuse, store.",
        None,
        "--stage",
    ),
]
ErrorType = Annotated[
    str | None, option("Only those of this error class, such as FetchRefused.", None, "--type")
]
Since = Annotated[
    str | None, option("Only those since then: 30m, 2h, 7d, or a date.", None, "--since")
]
Limit = Annotated[int, option("At most this many.", None, "--limit", min=1)]
All = Annotated[bool, flag("--all", "Every dead letter that matches the filters.")]

_NO_LIMIT = 1_000_000_000


def list_letters(
    *,
    stage: Stage = None,
    type_: ErrorType = None,
    since: Since = None,
    limit: Limit = 100,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """List dead letters, the newest first."""
    filters = _filters(stage, type_, since)
    with _queries(config, overrides) as (queries, _):
        jobs = queries.dead_letters(**filters, limit=limit)
    if as_json:
        print_json([letter_json(job) for job in jobs])
        return
    rows = [
        (
            job.post_id,
            *((job.last_error or {}).get(key, "") for key in ("stage", "type", "message")),
            job.attempts,
            moment(job.updated_at),
        )
        for job in jobs
    ]
    columns = ("post", "stage", "type", "reason", "attempts", "since")
    print_table(f"{len(rows)} dead letters", columns, rows)


def show(
    post_id: PostId,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Show one dead letter with its payload."""
    with _queries(config, overrides) as (queries, _):
        job = queries.job(post_id)
    if job is None or job.state != "dead":
        raise ConfigError(f"dead show: {post_id!r} is not a dead letter")
    content = letter_json(job)
    if as_json:
        print_json(content)
        return
    error = content.pop("error") or {}
    rows = [*content.items(), *((f"error.{key}", value) for key, value in error.items())]
    print_table("", ("field", "value"), rows)


def replay(
    ids: Ids = None,
    *,
    everything: All = False,
    stage: Stage = None,
    type_: ErrorType = None,
    since: Since = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Give dead letters all their attempts again and put them on the queue."""
    from king.broker.connect import publish_posts

    filters = _filters(stage, type_, since)
    with _queries(config, overrides, broker=True) as (queries, settings):
        chosen, wrong = _choose(queries, "replay", ids, filters, everything=everything)
        messages = queries.replay(chosen)
        # The jobs are queued already: if this fails, the daemon publishes them later by itself.
        count = publish_posts(settings.broker, messages)
    _tell("replay", f"replayed {count}", len(chosen) - count, wrong)


def drop(
    ids: Ids = None,
    *,
    everything: All = False,
    stage: Stage = None,
    type_: ErrorType = None,
    since: Since = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Delete dead letters."""
    filters = _filters(stage, type_, since)
    with _queries(config, overrides) as (queries, _):
        chosen, wrong = _choose(queries, "drop", ids, filters, everything=everything)
        count = queries.drop(chosen)
    _tell("drop", f"dropped {count}", len(chosen) - count, wrong)


def letter_json(job: Job) -> dict[str, Any]:
    """Return one dead letter as ``--json`` prints it."""
    return {
        "post_id": job.post_id,
        "error": dict(job.last_error) if job.last_error else None,
        "attempts": job.attempts,
        "payload": job.payload,
        "first_at": moment(job.first_at),
        "dead_at": moment(job.updated_at),
    }


def _tell(verb: str, done: str, rest: int, wrong: str) -> None:
    unchanged = f"; {rest} left as they were (no dead letter, or a message without an ID)"
    say(f"{done}{unchanged if rest else ''}\n")
    if wrong:
        raise ConfigError(f"dead {verb}: {wrong}")


@contextlib.contextmanager
def _queries(
    config: Path | None, overrides: Sequence[str] | None, *, broker: bool = False
) -> Iterator[tuple[PostQueries, Settings]]:
    from king.store.queries import open_queries

    settings = online_settings(config, overrides, broker=broker, store=True)
    with open_queries(settings.store) as queries:
        yield queries, settings


def _filters(stage: str | None, type_: str | None, since: str | None) -> dict[str, Any]:
    return {"stage": stage, "type": type_, "since_s": since_time(since, time.time())}


def _choose(
    queries: PostQueries,
    verb: str,
    ids: Sequence[str] | None,
    filters: dict[str, Any],
    *,
    everything: bool,
) -> tuple[list[str], str]:
    """Return the IDs of the chosen letters, and a message about IDs that cannot be."""
    filtered = everything or any(value is not None for value in filters.values())
    if not ids:
        if not filtered:
            raise ConfigError(f"dead {verb}: name IDs, a filter (--stage --type --since), or --all")
        return [job.post_id for job in queries.dead_letters(**filters, limit=_NO_LIMIT)], ""
    if filtered:
        raise ConfigError(f"dead {verb}: name IDs, or filters, not both")
    named = list(dict.fromkeys(ids))
    letters = queries.dead_among(named)
    unknown = [post_id for post_id in named if post_id not in letters]
    nameless = {i: job for i, job in letters.items() if verb == "replay" and not job.names_a_post}
    wrong = [f"no dead letter: {listed(unknown)} (see insighttag dead list)"] if unknown else []
    if nameless:
        wrong.append(f"names no post, so that it can only be dropped: {listed(list(nameless))}")
    chosen = [post_id for post_id in named if post_id in letters and post_id not in nameless]
    return chosen, "; ".join(wrong)


COMMANDS: Mapping[str, Callable[..., None]] = {
    "list": list_letters,
    "show": show,
    "replay": replay,
    "drop": drop,
}
