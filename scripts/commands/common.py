"""Options, settings, services and output of all commands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from common.cli import argument, flag, option, say
from common.logs import configure_logs
from common.progress import told_if_long
from common.urls import redact
from config.load import load_settings
from config.settings import Settings

Config = Annotated[
    Path | None, option("Settings, YAML; default: config/infer_config_e2e.yaml.", "F", "--config")
]
Overrides = Annotated[
    list[str] | None,
    option("Override one setting; a.b=@FILE reads it; repeatable.", "a.b=c", "--set"),
]
AsJson = Annotated[bool, flag("--json", "Print JSON instead of a table.")]
Ids = Annotated[list[str] | None, argument("IDs of posts.", "ID…")]
PostId = Annotated[str, typer.Argument(metavar="ID")]
Priority = Annotated[
    int, option("0 to 9; higher is taken first.", None, "--priority", min=0, max=9)
]

DOWN = "the embedded service is not running: insighttag services start"

_NAMED = 10


def settings_of(config: Path | None, overrides: Sequence[str] | None) -> Settings:
    """Load the settings and set up the logs by them."""
    settings = load_settings(config, overrides or ())
    configure_quiet_logs(settings)
    return settings


def configure_quiet_logs(settings: Settings) -> None:
    """Set up the logs of a command at a terminal: lines of the default level would tear its bars.

    ``-v`` shows them.
    """
    level = "warning" if settings.log.level == "info" else settings.log.level
    configure_logs(settings.log.format, level)


def online_settings(
    config: Path | None,
    overrides: Sequence[str] | None,
    *,
    broker: bool = False,
    store: bool = False,
) -> Settings:
    """Load the settings with ``embedded://`` replaced by the running services it needs."""
    from deploy.embedded import resolve

    needed = {"redis": broker, "mongo": store}
    settings = resolve(settings_of(config, overrides), [name for name in needed if needed[name]])
    if store:
        _reach_store(settings)
    if broker:
        _reach_broker(settings)
    return settings


def _reach_store(settings: Settings) -> None:
    from king.store.queries import open_queries

    url, timeout_s = redact(settings.store.url), settings.store.timeout_s
    waiting = f"database {url}: no answer yet; waiting for it, at most {timeout_s:g} s"
    with told_if_long(waiting), open_queries(settings.store) as queries:
        queries.ping()


def _reach_broker(settings: Settings) -> None:
    from king.broker.connect import reach

    url, timeout_s = redact(settings.broker.url), settings.broker.socket_timeout_s
    waiting = f"broker {url}: no answer yet; waiting for it, at most {timeout_s:g} s"
    with told_if_long(waiting):
        reach(settings.broker)


def listed(post_ids: Sequence[str]) -> str:
    """Return the first IDs, and the number of the others."""
    more = f" and {len(post_ids) - _NAMED} more" if len(post_ids) > _NAMED else ""
    return ", ".join(f"{post_id!r:.80}" for post_id in post_ids[:_NAMED]) + more


def say_row(name: str, text: str) -> None:
    """Print one line of a list of names and values."""
    say(f"{name:<10}{text}\n")


def ago(then_s: float | None, now_s: float) -> str:
    """Return the age of a Unix time, in words."""
    return f"{duration(now_s - then_s)} ago" if then_s else "never"


def duration(seconds: float) -> str:
    """Return a time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def moment(then_s: float | None) -> str:
    """Return a Unix time in ISO form, UTC."""
    if not then_s:
        return ""
    return datetime.fromtimestamp(then_s, timezone.utc).isoformat(timespec="seconds")
