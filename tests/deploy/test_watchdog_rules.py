"""The watchdog's judgement, as pure rules and with a fake supervisor."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import structlog

from config.errors import RetryableError
from config.load import load_settings
from config.settings import Settings, WatchdogSettings
from deploy.health import Snapshot, read_snapshot
from deploy.supervisor import Program
from deploy.watchdog import Budget, Observation, Watchdog, decide, main

LIMITS = WatchdogSettings(stall_s=60, start_timeout_s=900)
NOW = 1_000_000.0


def seen(
    *,
    state: str = "RUNNING",
    uptime_s: float = 5000,
    age_s: float | None = 1,
    phase: str = "serving",
) -> Observation:
    snapshot = None if age_s is None else Snapshot(7, NOW - age_s, phase, {})
    return Observation(NOW, Program(state, 7, NOW - uptime_s), snapshot, True)


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (seen(), "none"),
        (seen(age_s=59), "none"),
        (seen(age_s=61), "restart"),
        (seen(age_s=61, phase="draining"), "restart"),
        # A clock that was set back leaves a date in the future: that is no stall.
        (seen(age_s=-300), "none"),
        # Loading has a limit of its own, and its tick may stand still meanwhile.
        (seen(uptime_s=300, age_s=200, phase="loading"), "wait"),
        (seen(uptime_s=901, age_s=200, phase="loading"), "restart"),
        (seen(uptime_s=899, age_s=None), "wait"),
        (seen(uptime_s=901, age_s=None), "restart"),
        # What an earlier King wrote says nothing of the one that runs now.
        (seen(uptime_s=10, age_s=500), "wait"),
        (seen(uptime_s=1000, age_s=1500), "restart"),
        # supervisord's own business.
        (seen(state="BACKOFF", age_s=500), "none"),
        (seen(state="FATAL", age_s=5000), "none"),
        (seen(state="STOPPING", age_s=500), "none"),
        (seen(state="EXITED", age_s=None), "none"),
    ],
)
def test_decisions(observation: Observation, action: str) -> None:
    """Each situation gets the action that the rules promise, with a reason in one line."""
    decision = decide(observation, LIMITS)
    assert decision.action == action
    assert decision.reason
    assert "\n" not in decision.reason


def test_a_dead_kings_file_is_supervisors_business() -> None:
    """A stale file whose process is gone leads to no kill."""
    stale = seen(age_s=100)
    gone = Observation(stale.now, stale.program, stale.snapshot, snapshot_pid_exists=False)
    assert decide(gone, LIMITS).action == "none"


def test_budget_allows_so_many_restarts_within_the_window() -> None:
    """The budget refuses past its limit and recovers when the window has moved on."""
    budget = Budget(limit=2, window_s=100)
    assert [budget.take(0), budget.take(10), budget.take(99)] == [True, True, False]
    assert budget.take(101)


class FakeSupervisor:
    """Runs nothing; counts the kills."""

    def __init__(self, error: str | None = None) -> None:
        self.kills = 0
        self.error = error

    def program(self) -> Program:
        if self.error:
            raise RetryableError(self.error)
        return Program("RUNNING", os.getpid(), time.time() - 5000)

    def kill(self) -> None:
        self.kills += 1


def stale_settings(tmp_path: Path, *more: str) -> Settings:
    health = tmp_path / "king.json"
    health.write_text(
        json.dumps({"pid": os.getpid(), "updated_at": time.time() - 300, "phase": "running"})
    )
    changes = (f"king.health_file={health}", f"embedded.folder={tmp_path / 'embedded'}", *more)
    return load_settings(tmp_path_config(tmp_path), changes)


def tmp_path_config(tmp_path: Path) -> Path:
    config = tmp_path / "settings.yaml"
    config.write_text("{}")
    return config


def test_stale_king_is_killed_until_the_budget_is_spent(tmp_path: Path) -> None:
    """Each restart logs one line; past the budget one line says so and nothing more is killed."""
    supervisor = FakeSupervisor()
    settings = stale_settings(tmp_path, "watchdog.restarts=2")
    with structlog.testing.capture_logs() as logs:
        watchdog = Watchdog(settings, supervisor)
        for _ in range(5):
            watchdog.tick()
    assert supervisor.kills == 2
    events = [entry["event"] for entry in logs]
    assert events == ["watchdog.decision", "watchdog.decision", "watchdog.budget_spent"]
    assert "300 s old" in logs[0]["reason"]


def test_an_unreachable_supervisor_is_said_once(tmp_path: Path) -> None:
    """The watchdog lives on, and does not repeat itself at every round."""
    settings = stale_settings(tmp_path)
    with structlog.testing.capture_logs() as logs:
        watchdog = Watchdog(settings, FakeSupervisor("supervisor at x: no such file"))
        assert [watchdog.tick(), watchdog.tick()] == [None, None]
    assert [entry["event"] for entry in logs] == ["watchdog.supervisor_unreachable"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": "x", "updated_at": 1}', '{"pid": 1, "updated_at": null}']
)
def test_unreadable_health_file_is_no_snapshot(tmp_path: Path, text: str) -> None:
    """Whatever stands in the file, reading it raises nothing."""
    file = tmp_path / "king.json"
    file.write_text(text)
    assert read_snapshot(file) is None
    assert read_snapshot(tmp_path / "absent.json") is None


def test_a_wrong_setting_ends_the_watchdog_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line, which supervisord does not restart."""
    assert main(["--config", str(tmp_path_config(tmp_path)), "--set", "watchdog.stall_s=soon"]) == 2
    error = capsys.readouterr().err
    assert "watchdog.stall_s" in error
    assert error.count("\n") == 1
