"""Checks of a snapshot against thresholds, each with its state; and how they are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

import structlog
from rich.text import Text

from common.cli import say
from common.tables import console, print_table
from config.settings import MonitorSettings, Threshold
from scripts.commands.common import duration
from scripts.mongo_supervisor.snapshot import Snapshot

State: TypeAlias = Literal["ok", "warning", "critical", "unknown"]

EXIT_CODES: dict[State, int] = {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}
"""Exit codes of monitoring plugins."""
_BY_WEIGHT: tuple[State, ...] = ("critical", "warning", "unknown", "ok")
_GOOD_MEMBERS = {"PRIMARY", "SECONDARY", "ARBITER"}
_NO_LIMITS = Threshold()


@dataclass(frozen=True)
class Check:
    """One line of the table; no `value` where there is nothing to hold against the thresholds."""

    name: str
    state: State
    value: float | None
    text: str
    threshold: Threshold = _NO_LIMITS


def judge(snapshot: Snapshot, limits: MonitorSettings) -> list[Check]:
    """Return every check, in a fixed order."""
    if snapshot.latency_s is None:
        reason = snapshot.errors.get("latency_s", "no answer")
        return [Check("database", "critical", None, reason), _queue(snapshot, limits)]
    milliseconds = f"answers in {snapshot.latency_s * 1000:.1f} ms"
    return [
        _check("database", snapshot.latency_s, limits.latency_s, milliseconds),
        *_replicas(snapshot, limits),
        _backlog(snapshot, limits),
        _failed_ratio(snapshot, limits),
        _last_tag(snapshot, limits),
        *_jobs(snapshot, limits),
        _queue(snapshot, limits),
    ]


def worst(checks: Sequence[Check]) -> State:
    """Return the worst state; ``unknown`` weighs less than a known fault."""
    states = {check.state for check in checks}
    return next((state for state in _BY_WEIGHT if state in states), "unknown")


def _check(name: str, value: float, threshold: Threshold, text: str) -> Check:
    state: State = "ok"
    if threshold.critical is not None and value >= threshold.critical:
        state = "critical"
    elif threshold.warning is not None and value >= threshold.warning:
        state = "warning"
    return Check(name, state, value, text, threshold)


def _unknown(name: str, snapshot: Snapshot, field: str) -> Check:
    return Check(name, "unknown", None, snapshot.errors.get(field, "not known"))


def _replicas(snapshot: Snapshot, limits: MonitorSettings) -> list[Check]:
    if "replicas" in snapshot.errors:
        return [_unknown("replicas", snapshot, "replicas")]
    if snapshot.replicas is None:
        return []
    name, states = snapshot.replicas.name, snapshot.replicas.states
    if not states:
        return [Check("replicas", "ok", None, f"set {name}; no right to see its members")]
    shown = f"set {name}: " + ", ".join(f"{m} {state}" for m, state in sorted(states.items()))
    if "PRIMARY" not in states.values():
        return [Check("replicas", "critical", None, f"no primary; {shown}")]
    lag_s = max(snapshot.replicas.lag_s.values(), default=0.0)
    text = f"{shown}; {lag_s:.0f} s behind"
    check = _check("replicas", lag_s, limits.replica_lag_s, text)
    if check.state == "ok" and not set(states.values()) <= _GOOD_MEMBERS:
        return [Check("replicas", "warning", lag_s, check.text, limits.replica_lag_s)]
    return [check]


def _backlog(snapshot: Snapshot, limits: MonitorSettings) -> Check:
    backlog = snapshot.backlog
    if backlog is None:
        return _unknown("backlog", snapshot, "backlog")
    least = "" if backlog.complete else "at least "
    text = (
        f"{backlog.old} untagged for {limits.backlog_age_s:g} s or longer, "
        f"of {least}{backlog.untagged} untagged"
    )
    if backlog.oldest_s is not None:
        text += f"; the oldest is {duration(backlog.oldest_s)} old"
    if backlog.ageless and limits.backlog_age_s:
        text += f"; {backlog.ageless} have no known age: set store.fields.created"
    return _check("backlog", backlog.old, limits.backlog, text)


def _failed_ratio(snapshot: Snapshot, limits: MonitorSettings) -> Check:
    results = snapshot.results
    if results is None:
        return _unknown("failed_ratio", snapshot, "results")
    total = results.tagged + results.failed
    text = f"{results.failed} of {total} results of the last {duration(limits.window_s)}"
    if total < limits.min_results:
        too_few = f"{text}; too few to judge"
        return Check("failed_ratio", "ok", None, too_few, limits.failed_ratio)
    return _check("failed_ratio", results.failed / total, limits.failed_ratio, text)


def _last_tag(snapshot: Snapshot, limits: MonitorSettings) -> Check:
    """Judge the time since the last tag, which is a fault only while posts wait."""
    name, threshold = "last_tag_age_s", limits.last_tag_age_s
    if snapshot.results is None:
        return _unknown(name, snapshot, "results")
    age_s = snapshot.results.last_tag_s
    old = snapshot.backlog is not None and snapshot.backlog.old > 0
    due = snapshot.jobs is not None and snapshot.jobs.due > 0
    text = "no post was ever tagged" if age_s is None else f"{duration(age_s)} ago"
    if not (snapshot.queue_depth or old or due):
        return Check(name, "ok", age_s, f"{text}; no posts wait", threshold)
    if age_s is None:
        oldest_s = snapshot.backlog.oldest_s if snapshot.backlog is not None else None
        return _check(name, oldest_s or 0.0, threshold, text)
    return _check(name, age_s, threshold, f"{text}, and posts wait")


def _jobs(snapshot: Snapshot, limits: MonitorSettings) -> list[Check]:
    jobs = snapshot.jobs
    if jobs is None:
        return [_unknown(name, snapshot, "jobs") for name in ("overdue_jobs", "dead_letters")]
    opened = ", ".join(f"{n} {state}" for state, n in jobs.states.items() if state != "dead")
    overdue = f"{jobs.overdue} due for {limits.overdue_s:g} s or longer, {jobs.due} due; {opened}"
    dead = jobs.states.get("dead", 0)
    return [
        _check("overdue_jobs", jobs.overdue, limits.overdue_jobs, overdue),
        _check("dead_letters", dead, limits.dead_letters, f"{dead} set aside"),
    ]


def _queue(snapshot: Snapshot, limits: MonitorSettings) -> Check:
    depth = snapshot.queue_depth
    if depth is None:
        reason = snapshot.errors.get("queue_depth", "no answer")
        return Check("queue_depth", "critical", None, reason)
    return _check("queue_depth", depth, limits.queue_depth, f"{depth} messages wait")


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
    if redraw:
        console().clear()
    say(plugin_line(checks) + "\n")
    sys.stdout.flush()
    rows = [
        (
            Text(check.state, _COLOURS[check.state]),
            check.name,
            check.text,
            _limit(check.threshold.warning),
            _limit(check.threshold.critical),
        )
        for check in checks
    ]
    print_table("", ("state", "check", "finding", "warning", "critical"), rows)


def as_dict(checks: Sequence[Check], requeued: int | None = None) -> dict[str, Any]:
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
                **check.threshold.model_dump(),
            }
            for check in checks
        },
        "requeued": requeued,
    }


def log_look(checks: Sequence[Check]) -> None:
    """Log one event, at the level that its state deserves."""
    state = worst(checks)
    write = {"ok": log.info, "warning": log.warning}.get(state, log.error)
    values = {check.name: check.value for check in checks if check.value is not None}
    write("mongo_supervisor.looked", state=state, summary=summary(checks), **values)


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
