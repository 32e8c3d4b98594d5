"""``insighttag status``: the queue, the database, the King and the embedded services.

Asks each of them with a short time-out and starts none: what cannot be reached is said to be so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import typer

from common.cli import print_json, say
from common.errors import ConfigError, TaggingError
from common.processes import process_identity
from common.progress import told_if_long
from common.tables import print_table
from common.urls import redact
from config.settings import BrokerSettings, Settings, StoreSettings
from deploy import embedded
from king.status import read_health
from scripts.commands.common import DOWN, AsJson, Config, Overrides, ago, say_row, settings_of
from scripts.commands.services import view_json

_TIMEOUT_S = 3.0
_FRESH_S = 10.0
# What a worker's name says already, and what top shows: with them the table is wider than eighty
# columns.
_NOT_SHOWN = ("role", "batches")


def status(as_json: AsJson = False, config: Config = None, overrides: Overrides = None) -> None:
    """Say how the queue and the daemon stand.

    Queue depth, posts in flight, rates, dead letters; what cannot be reached is said to be so, and
    the exit code is 1.
    """
    asked = settings_of(config, overrides)
    content = collect(asked, embedded.peek(asked))
    if as_json:
        print_json(content)
    else:
        _print(content)
    # An embedded service that is down starts with the next command that needs it.
    if any(content[name]["error"] not in (None, DOWN) for name in ("queue", "store")):
        raise typer.Exit(1)


def collect(asked: Settings, settings: Settings) -> dict[str, Any]:
    """Return everything that ``--json`` prints.

    Args:
        asked: As configured; tells whether the services are embedded ones.
        settings: With the URLs of running embedded services.
    """
    services = embedded.status(asked) if embedded.configured(asked) else None
    return {
        "queue": _queue(settings.broker),
        "store": _store(settings.store),
        "king": king_health(settings),
        "services": services and [view_json(view) for view in services],
    }


def _queue(settings: BrokerSettings) -> dict[str, Any]:
    from king.broker.connect import queue_counts

    timeout_s = min(settings.socket_timeout_s, _TIMEOUT_S)
    quick = settings.model_copy(update={"socket_timeout_s": timeout_s})
    about = {"url": redact(settings.url), "name": settings.queue}
    answer = _answer("counts", settings.url, lambda: queue_counts(quick))
    depth, unacknowledged = answer.pop("counts") or (None, None)
    return {**about, "depth": depth, "unacknowledged": unacknowledged, **answer}


def _store(settings: StoreSettings) -> dict[str, Any]:
    from king.store.queries import open_queries

    def counts() -> dict[str, Any]:
        quick = settings.model_copy(update={"timeout_s": min(settings.timeout_s, _TIMEOUT_S)})
        with open_queries(quick) as queries:
            return dict(queries.counts())

    about = {"url": redact(settings.url), "database": settings.database}
    return {**about, **_answer("counts", settings.url, counts)}


def _answer(name: str, url: str, question: Callable[[], Any]) -> dict[str, Any]:
    """Return the answer of a service under its name, or the reason why there is none."""
    if url.startswith(embedded.SCHEME):
        return {name: None, "error": DOWN}
    waiting = f"{redact(url)}: no answer yet; waiting for it, at most {_TIMEOUT_S:g} s"
    try:
        with told_if_long(waiting):
            return {name: question(), "error": None}
    except ConfigError:
        raise
    except TaggingError as error:
        said = str(error).removeprefix("broker ").removeprefix(f"{redact(url)}: ")
        return {name: None, "error": said}


def king_health(settings: Settings) -> dict[str, Any] | None:
    """Return the health file of the King, with its age and whether it is alive."""
    health = read_health(settings.king.health_file)
    if health is None:
        return None
    age_s = max(0.0, time.time() - health["updated_at"])
    alive = process_identity(health["pid"]) == health.get("process") and age_s < _FRESH_S
    return {**health, "alive": alive, "age_s": round(age_s, 1)}


def _print(content: dict[str, Any]) -> None:
    queue, store = content["queue"], content["store"]
    say(f"queue     {queue['name']} at {queue['url']}: ")
    unacknowledged = queue["unacknowledged"]
    in_hand = f", {unacknowledged} unacknowledged" if unacknowledged is not None else ""
    waiting = f"{queue['depth']} waiting{in_hand}"
    say(f"{queue['error'] or waiting}\n")
    say(f"database  {store['database']} at {store['url']}: ")
    if store["error"] is None:
        counts = store["counts"]
        shown = ("posts", "tagged", "partial", "failed", "untagged")
        posts = ", ".join(f"{counts[k]} {k}" for k in shown)
        jobs = ", ".join(f"{number} {state}" for state, number in counts["jobs"].items())
        say(f"{posts}\n          jobs: {jobs}\n")
    else:
        say(f"{store['error']}\n")
    _print_king(content["king"])
    for service in content["services"] or ():
        say_row("service", f"{service['name']}: {service['state']} {service['url'] or ''}")


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _print_king(king: dict[str, Any] | None) -> None:
    if king is None:
        say_row("king", "not running (no health file)")
        return
    seen = ago(king["updated_at"], time.time())
    if not king["alive"]:
        say_row("king", f"not running (pid {king['pid']} was last seen {seen})")
        return
    bundle = king.get("bundle") or {}
    serving = f", bundle {bundle['name']} {bundle['version']}" if bundle else ""
    say_row("king", f"{king.get('phase')} (pid {king['pid']}){serving}")
    if trial := king.get("shadow"):
        say(f"          on trial: bundle {trial['name']} {trial['version']}\n")
    for key, what in (("bundle_refused", "served"), ("shadow_refused", "tried")):
        if king.get(key):
            say(f"          a bundle is not {what}: {king[key]}\n")
    if king.get("publish_refused"):
        say(f"          blocked: it cannot publish retries: {king['publish_refused']}\n")
    oldest = king.get("oldest_in_flight_s") or 0.0
    say(
        f"          {king.get('in_flight')} in flight (oldest {oldest:.1f} s), "
        f"{king.get('posts_per_s')} posts/s over the last minute\n"
    )
    counters = king.get("counters") or {}
    say(f"          since its start: {', '.join(f'{v} {k}' for k, v in counters.items())}\n")
    workers = king.get("workers") or []
    if workers:
        columns = tuple(key for key in workers[0] if key not in _NOT_SHOWN)
        rows = [[_cell(worker.get(column)) for column in columns] for worker in workers]
        print_table("", columns, rows)
