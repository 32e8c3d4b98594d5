"""Output of one look: plugin line and table, JSON, or a line in the log."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import structlog

from scripts.commands.common import console
from scripts.mongo_supervisor.checks import Check, worst

_COLOURS = {"ok": "green", "warning": "yellow", "critical": "bold red", "unknown": "magenta"}
_SHORT = 300

log = structlog.get_logger()


def summary(checks: Sequence[Check]) -> str:
    """Return the worst state and every check that is not ok: ``WARNING: backlog: 120 untagged``."""
    state = worst(checks)
    odd = [f"{c.name}: " + " ".join(c.text.split())[:_SHORT] for c in checks if c.state != "ok"]
    told = "; ".join(odd) if odd else f"{len(checks)} checks"
    return f"{state.upper()}: {told}"


def plugin_line(checks: Sequence[Check]) -> str:
    """Return the summary with performance data, as monitoring plugins print it."""
    measured = [
        f"{check.name}={check.value:.6g};{_limit(check.threshold.warning)};"
        f"{_limit(check.threshold.critical)}"
        for check in checks
        if check.value is not None
    ]
    # A bar separates the two, so the text must not contain one.
    told = summary(checks).replace("|", "/")
    return f"{told} | {' '.join(measured)}" if measured else told


def show(checks: Sequence[Check], *, redraw: bool = False) -> None:
    """Print the plugin line, and the table below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("state", "check", "finding", "warning", "critical"):
        table.add_column(column, overflow="fold")
    for check in checks:
        limits = (check.threshold.warning, check.threshold.critical)
        table.add_row(
            Text(check.state, _COLOURS[check.state]),
            check.name,
            Text(check.text),
            *(_limit(limit) for limit in limits),
        )
    terminal = console()
    if redraw:
        terminal.clear()
    sys.stdout.write(plugin_line(checks) + "\n")
    sys.stdout.flush()
    terminal.print(table)


def as_json(checks: Sequence[Check], requeued: int | None = None) -> dict[str, Any]:
    """Return the content of ``--json``."""
    return {
        "state": worst(checks),
        "summary": summary(checks),
        "looked_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checks": {
            check.name: {
                "state": check.state,
                "value": check.value,
                "text": check.text,
                "warning": check.threshold.warning,
                "critical": check.threshold.critical,
            }
            for check in checks
        },
        "requeued": requeued,
    }


def write_json_line(checks: Sequence[Check]) -> None:
    sys.stdout.write(json.dumps(as_json(checks), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def log_look(checks: Sequence[Check]) -> None:
    """Log one event, at the level that its state deserves."""
    state = worst(checks)
    write = {"ok": log.info, "warning": log.warning}.get(state, log.error)
    values = {check.name: check.value for check in checks if check.value is not None}
    write("mongo_supervisor.looked", state=state, summary=summary(checks), **values)


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
