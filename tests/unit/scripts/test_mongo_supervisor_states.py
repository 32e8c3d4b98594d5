"""Judgement of the monitor: states, exit codes, one line."""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from bson import ObjectId

from common.times import moment_of
from config.settings import MonitorSettings, Threshold
from scripts.mongo_supervisor.checks import EXIT_CODES, as_dict, judge, plugin_line, summary, worst
from scripts.mongo_supervisor.snapshot import (
    Backlog,
    Jobs,
    Replicas,
    Results,
    Snapshot,
    replicas_of,
)


def snapshot(**changes: Any) -> Snapshot:
    """Return the snapshot of a healthy system, with changes."""
    values: dict[str, Any] = {
        "latency_s": 0.002,
        "replicas": None,
        "backlog": Backlog(5, 0, 0, 30.0, True),
        "results": Results(95, 2, 10.0),
        "jobs": Jobs({"running": 3, "waiting": 1, "queued": 0, "dead": 4}, 1, 0),
        "queue_depth": 7,
        "errors": {},
    }
    return Snapshot(**{**values, **changes})


@pytest.mark.parametrize(
    ("seen", "state", "told"),
    [
        (snapshot(), "ok", "OK: 7 checks"),
        (snapshot(latency_s=0.6), "warning", "answers in 600.0 ms"),
        (snapshot(latency_s=2.0), "critical", "answers in 2000.0 ms"),
        (
            snapshot(latency_s=None, errors={"latency_s": "refused"}),
            "critical",
            "database: refused",
        ),
        (snapshot(backlog=Backlog(300, 200, 0, 2000.0, True)), "warning", "200 untagged for 900 s"),
        (snapshot(backlog=Backlog(9, 10_000, 0, 7200, False)), "critical", "at least 9 untagged"),
        (snapshot(backlog=None, errors={"backlog": "too slow"}), "unknown", "backlog: too slow"),
        (snapshot(results=Results(95, 5, 1.0)), "warning", "5 of 100 results of the last 1 h"),
        (snapshot(results=Results(0, 30, 1.0)), "critical", "30 of 30"),
        (snapshot(results=Results(0, 19, 1.0)), "ok", "OK"),
        # Silence is a fault only while posts wait.
        (snapshot(results=Results(0, 0, 4000.0)), "critical", "1.11 h ago, and posts wait"),
        (snapshot(results=Results(0, 0, 4000.0), queue_depth=0, jobs=Jobs({}, 0, 0)), "ok", "OK"),
        (
            snapshot(results=Results(0, 0, None), backlog=Backlog(9, 9, 0, 1000.0, True)),
            "warning",
            "no post was ever tagged",
        ),
        (snapshot(jobs=Jobs({"dead": 0}, 5, 3)), "warning", "3 due for 120 s or longer, 5 due"),
        (snapshot(jobs=Jobs({"dead": 100}, 0, 0)), "warning", "100 set aside"),
        (snapshot(queue_depth=20_000), "warning", "20000 messages wait"),
        (snapshot(queue_depth=None, errors={"queue_depth": "refused"}), "critical", "refused"),
        # Replica sets.
        (snapshot(replicas=Replicas("rs0")), "ok", "OK: 8 checks"),
        (
            snapshot(replicas=Replicas("rs0", {"a": "PRIMARY", "b": "SECONDARY"}, {"b": 11.0})),
            "warning",
            "11 s behind",
        ),
        (snapshot(replicas=Replicas("rs0", {"a": "SECONDARY"})), "critical", "no primary"),
        (
            snapshot(replicas=Replicas("rs0", {"a": "PRIMARY", "b": "RECOVERING"})),
            "warning",
            "b RECOVERING",
        ),
        # What is known to be wrong weighs more than what is not known.
        (
            snapshot(latency_s=0.6, results=None, errors={"results": "too slow"}),
            "warning",
            "too slow",
        ),
    ],
)
def test_each_fact_has_its_state(seen: Snapshot, state: str, told: str) -> None:
    checks = judge(seen, MonitorSettings())
    assert worst(checks) == state
    assert summary(checks).startswith(f"{state.upper()}: ")
    assert told in summary(checks)
    assert "\n" not in plugin_line(checks)
    json.dumps(as_dict(checks))


def test_exit_codes_are_those_of_monitoring_plugins() -> None:
    """Other programs rely on these numbers."""
    assert EXIT_CODES == {"ok": 0, "warning": 1, "critical": 2, "unknown": 3}


def test_the_plugin_line_has_performance_data() -> None:
    """``name=value;warning;critical`` after the only bar."""
    errors = {"queue_depth": "a | b"}
    line = plugin_line(judge(snapshot(queue_depth=None, errors=errors), MonitorSettings()))
    text, bar, data = line.partition(" | ")
    assert bar
    assert "a / b" in text
    assert "database=0.002;0.5;2" in data.split()
    assert "dead_letters=4;100;10000" in data.split()
    open_ended = MonitorSettings(backlog=Threshold())
    assert " backlog=0;;" in plugin_line(judge(snapshot(), open_ended))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (datetime(2026, 1, 1, tzinfo=timezone.utc), 1767225600),
        (datetime(2026, 1, 1), 1767225600),
        ("2026-01-01T01:00:00+01:00", 1767225600),
        ("2026-01-01T00:00:00Z", 1767225600),
        (1767225600, 1767225600),
        (1767225600000, 1767225600),
        (ObjectId.from_datetime(datetime(2026, 1, 1, tzinfo=timezone.utc)), 1767225600),
        ("yesterday", None),
        (True, None),
        (None, None),
        ([1], None),
    ],
)
def test_times_of_many_types_are_read(value: object, seconds: float | None) -> None:
    assert moment_of(value) == seconds


def test_a_replica_sets_answer_is_read() -> None:
    """Members, states and lags; an arbiter has no lag, and an empty answer is none."""
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    members = [
        {"name": "a:1", "stateStr": "PRIMARY", "optimeDate": at},
        {"name": "b:1", "stateStr": "SECONDARY", "optimeDate": at - timedelta(seconds=12)},
        {"name": "c:1", "stateStr": "ARBITER"},
        {"name": "d:1", "stateStr": "(not reachable/healthy)", "optimeDate": at},
        "odd",
    ]
    read = replicas_of("rs0", {"members": members})
    assert read.states["d:1"] == "(not reachable/healthy)"
    assert read.lag_s == {"b:1": 12.0}
    assert replicas_of("rs0", {"ok": 1, "result": []}) == Replicas("rs0")
