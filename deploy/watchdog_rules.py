"""When a King is stalled: one observation in, one decision out; pure.

Judged is progress, not life. A stall is a thread whose loop has stopped, work in flight past its
deadline, or idleness beside a backlog. No stall is an empty queue, models that load (they have a
limit of their own), a drain (likewise), or a broker or database that is down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from config.settings import Settings
from deploy.supervisor import Program

LOADING_PHASES = frozenset({"starting", "loading"})
DRAINING_PHASES = frozenset({"draining", "stopped"})
_ALIVE_STATES = frozenset({"RUNNING", "STARTING"})
_GIVEN_UP_STATES = frozenset({"FATAL", "UNKNOWN"})
_DRAIN_SLACK_S = 40.0  # flush, and waiting for three threads to end

Action: TypeAlias = Literal["none", "wait", "nudge", "restart", "alarm"]


@dataclass(frozen=True)
class Observation:
    """What is known of the King at one moment; durations are the watchdog's own measurements.

    Attributes:
        seen_s: For how long this very process has been watched.
        phase: Of the health file; None when this process has not written one yet.
        phase_s: For how long it has been in this phase.
        tick_ages: Thread ─► seconds since its loop was last seen to come round, or since what it
            waits for was last seen to be down.
        overdue_s: How long the oldest post has been in flight while the King was serving.
        starved_s: How long the King has been idle beside a backlog.
        backlog: Messages that wait, when that was asked.
        broker_error: Why the broker cannot be reached, when that was asked.
        store_error: The same of the database.
        file_error: Why no health file can be written, when that was asked.
    """

    program: Program
    seen_s: float
    phase: str | None = None
    phase_s: float = 0.0
    tick_ages: Mapping[str, float] = field(default_factory=dict)
    overdue_s: float = 0.0
    starved_s: float = 0.0
    backlog: int | None = None
    broker_error: str | None = None
    store_error: str | None = None
    file_error: str | None = None


@dataclass(frozen=True)
class Decision:
    """What to do, and why in one line."""

    action: Action
    reason: str


Rule = Callable[[Observation, Settings], "Decision | None"]


def not_running(seen: Observation, settings: Settings) -> Decision | None:
    """The supervisor starts, stops and gives up on programs by itself."""
    del settings
    if seen.program.state in _ALIVE_STATES:
        return None
    if seen.program.state in _GIVEN_UP_STATES:
        state = seen.program.state
        return Decision("alarm", f"the King is {state}: the supervisor has given up, start it")
    return Decision("none", f"the King is {seen.program.state}: the supervisor's business")


def starting(seen: Observation, settings: Settings) -> Decision | None:
    """No word yet, or models are loading: that has a limit of its own."""
    if seen.phase is not None and seen.phase not in LOADING_PHASES:
        return None
    limit_s = settings.watchdog.start_timeout_s
    what = "wrote no health file" if seen.phase is None else f"is still {seen.phase}"
    if seen.seen_s > limit_s:
        reason = f"the King {what} after {seen.seen_s:.0f} s (start_timeout_s {limit_s:g})"
        return Decision("restart", reason)
    if _stale(seen, "main", settings):
        return None  # the thread that only waits for the models does not wait any more
    return Decision("wait", f"the King {what}")


def draining(seen: Observation, settings: Settings) -> Decision | None:
    """A drain waits for what is in flight; its threads end one by one."""
    if seen.phase not in DRAINING_PHASES:
        return None
    limit_s = settings.king.drain_timeout_s + settings.workers.shutdown_timeout_s + _DRAIN_SLACK_S
    if seen.phase_s > limit_s:
        return Decision("restart", f"the King is {seen.phase} for {seen.phase_s:.0f} s")
    return Decision("wait", f"the King is {seen.phase}")


def stopped_thread(seen: Observation, settings: Settings) -> Decision | None:
    """Each thread ticks several times a second, unless what it waits for is down."""
    limit = f"stall_s {settings.watchdog.stall_s:g}"
    if _stale(seen, "main", settings):
        if seen.file_error is not None:
            return Decision("alarm", f"the King cannot be judged: {seen.file_error}")
        age_s = seen.tick_ages["main"]
        return Decision("restart", f"the King's main thread last moved {age_s:.0f} s ago ({limit})")
    for thread in ("dispatch", "broker", "store"):
        if _stale(seen, thread, settings):
            age_s = seen.tick_ages[thread]
            reason = f"the King's {thread} thread last moved {age_s:.0f} s ago ({limit})"
            return Decision("restart", reason)
    return None


def outage(seen: Observation, settings: Settings) -> Decision | None:
    """A restart repairs neither broker nor database."""
    del settings
    for what, phase, error in (
        ("database", "store_down", seen.store_error),
        ("broker", "broker_down", seen.broker_error),
    ):
        if seen.phase == phase or error is not None:
            shown = f": {error}" if error else ""
            return Decision("wait", f"the King waits for the {what}{shown}")
    return None


def overdue(seen: Observation, settings: Settings) -> Decision | None:
    """Every post in flight ends by its deadline, well or not."""
    # A post may first wait for the lease of a neighbour that died.
    margin_s = max(settings.watchdog.stall_s, settings.king.lease_s + 5)
    deadline_s = settings.king.post_deadline_s
    if seen.overdue_s <= deadline_s + margin_s:
        return None
    limit = f"king.post_deadline_s {deadline_s:g} + {margin_s:g}"
    return Decision("restart", f"a post is in flight for {seen.overdue_s:.0f} s ({limit})")


def starved(seen: Observation, settings: Settings) -> Decision | None:
    """Idle while messages wait: the broker has forgotten this consumer, or the King the broker."""
    stall_s = settings.watchdog.stall_s
    if seen.starved_s <= stall_s / 2:
        return None
    what = f"the King is idle for {seen.starved_s:.0f} s while {seen.backlog} messages wait"
    if seen.starved_s > stall_s:
        return Decision("restart", f"{what} (stall_s {stall_s:g})")
    return Decision("nudge", what)


RULES: tuple[Rule, ...] = (
    not_running,
    starting,
    draining,
    stopped_thread,
    outage,
    overdue,
    starved,
)
"""In order; the first that has something to say decides."""


def decide(seen: Observation, settings: Settings) -> Decision:
    """Judge one observation."""
    for rule in RULES:
        decision = rule(seen, settings)
        if decision is not None:
            return decision
    return Decision("none", "the King makes progress")


def _stale(seen: Observation, thread: str, settings: Settings) -> bool:
    return seen.tick_ages.get(thread, 0.0) > settings.watchdog.stall_s
