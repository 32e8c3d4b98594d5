"""The watchdog's judgement: pure rules on one observation."""

from typing import Any

import pytest

from config.settings import KingSettings, Settings, WatchdogSettings
from deploy.supervisor import Program
from deploy.watchdog import Observation, decide

LIMITS = Settings(
    watchdog=WatchdogSettings(stall_s=60, start_timeout_s=900),
    king=KingSettings(post_deadline_s=300, lease_s=60, drain_timeout_s=30),
)
THREADS = ("main", "broker", "store", "dispatch")


def seen(*, state: str = "RUNNING", phase: str | None = "serving", **facts: Any) -> Observation:
    """Build a healthy King with some values changed; ``main=61`` is a thread's age."""
    ages = {thread: facts.pop(thread, 0.2) for thread in THREADS}
    return Observation(
        program=Program(state, 7, "boot-5"),
        phase=phase,
        tick_ages=ages,
        **{"seen_s": 5000.0, "phase_s": 4000.0, **facts},
    )


@pytest.mark.parametrize(
    ("observation", "action", "told"),
    [
        (seen(), "none", "makes progress"),
        # A thread's loop has stopped.
        (seen(main=59, broker=59, store=59, dispatch=59), "none", "progress"),
        (seen(main=61), "restart", "main thread last moved 61 s ago"),
        (seen(broker=61), "restart", "broker thread"),
        (seen(store=61), "restart", "store thread"),
        (seen(dispatch=61), "restart", "dispatch thread"),
        (seen(main=61, broker=61, store=61, dispatch=61), "restart", "main thread"),
        (seen(phase="store_down", dispatch=61), "restart", "dispatch thread"),
        (seen(main=500, file_error="run cannot be written"), "alarm", "cannot be judged: run"),
        # Loading has a limit of its own; its main thread only waits, and does tick.
        (seen(phase="loading", seen_s=300, dispatch=200), "wait", "still loading"),
        (seen(phase="loading", seen_s=300, main=61), "restart", "main thread"),
        (seen(phase="loading", seen_s=901), "restart", "start_timeout_s 900"),
        (seen(phase=None, seen_s=899), "wait", "wrote no health file"),
        (seen(phase=None, seen_s=901), "restart", "wrote no health file after 901 s"),
        # A drain too: its threads end one by one.
        (seen(phase="draining", phase_s=70, main=65, broker=65), "wait", "is draining"),
        (seen(phase="draining", phase_s=81), "restart", "draining for 81 s"),
        (seen(phase="stopped", phase_s=1, main=100), "wait", "is stopped"),
        # Outages.
        (seen(phase="store_down"), "wait", "waits for the database"),
        (seen(phase="broker_down", overdue_s=0.0), "wait", "waits for the broker"),
        # Work past its deadline; a post may have waited for a dead neighbour's lease before.
        (seen(overdue_s=364), "none", "progress"),
        (seen(overdue_s=366), "restart", "in flight for 366 s"),
        # Idle beside a backlog.
        (seen(starved_s=29, backlog=3), "none", "progress"),
        (seen(starved_s=31, backlog=3), "nudge", "idle for 31 s while 3 messages wait"),
        (seen(starved_s=61, backlog=3), "restart", "stall_s 60"),
        # The supervisor's own business.
        (seen(state="BACKOFF", main=500), "none", "BACKOFF"),
        (seen(state="STOPPING", main=500), "none", "STOPPING"),
        (seen(state="EXITED", phase=None), "none", "EXITED"),
        (seen(state="FATAL"), "alarm", "has given up"),
    ],
)
def test_decisions(observation: Observation, action: str, told: str) -> None:
    """Each situation gets the action that the rules promise, with a reason in one line."""
    decision = decide(observation, LIMITS)
    assert (decision.action, decision.reason) == (action, decision.reason)
    assert told in decision.reason
    assert "\n" not in decision.reason
