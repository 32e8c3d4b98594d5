"""The watchdog's judgement of progress, its rules, and probes."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.processes import process_identity
from config.settings import KingSettings, Settings, WatchdogSettings
from deploy.probe import judge, main
from deploy.supervisor import Program
from deploy.watchdog import Observation, Progress, decide

WALL = 1_700_000_000.0
THREADS = ("main", "broker", "store", "dispatch")


class Story:
    """A King whose health file is written once a second, and a watchdog that looks each second."""

    def __init__(self, health_file: Path = Path(os.devnull)) -> None:
        self.settings = Settings(
            watchdog=WatchdogSettings(stall_s=10, interval_s=1),
            king=KingSettings(post_deadline_s=20, lease_s=1, health_file=health_file),
        )
        self.now = 0.0
        self.wall = WALL
        self.process = "boot-5"
        self.backlog: int | None = 0
        self.questions = 0
        self.progress = Progress(self.settings, self._ask_queue, lambda: self.now)
        self.frozen: set[str] = set()
        self.ticks = dict.fromkeys(THREADS, WALL)
        self.updated_at = WALL
        self.content: dict[str, Any] = {"in_flight": 0, "last_delivery_at": None, "counters": {}}
        self.phase = "serving"
        self.writer = "boot-5"
        self.actions: list[str] = []

    def _ask_queue(self) -> int | None:
        self.questions += 1
        return self.backlog

    def run(self, seconds: int) -> Observation:
        """Let time pass; gives the last observation."""
        for _ in range(seconds):
            self.now += 1
            self.wall += 1
            if "main" not in self.frozen:
                self.updated_at = self.wall
                for thread in THREADS:
                    if thread not in self.frozen:
                        self.ticks[thread] = self.wall
            health = {
                **self.content,
                "ticks": dict(self.ticks),
                "process": self.writer,
                "updated_at": self.updated_at,
                "phase": self.phase,
            }
            seen = self.progress.observe(Program("RUNNING", 7, self.process), health)
            self.actions.append(decide(seen, self.settings).action)
        return seen

    @property
    def first(self) -> dict[str, int]:
        """Action ─► second in which it came first."""
        return {action: self.actions.index(action) + 1 for action in dict.fromkeys(self.actions)}


@pytest.mark.parametrize("thread", THREADS)
def test_a_thread_that_stops_is_seen_after_stall_s(thread: str) -> None:
    """Each of the King's threads is watched; a restart is due once, and not before its time."""
    story = Story()
    story.run(5)
    story.frozen = {thread}
    assert story.run(12).tick_ages[thread] == 12
    assert story.first["restart"] == 5 + 11


@pytest.mark.parametrize("step_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_is_no_stall(step_s: float) -> None:
    """Forward or back, only what changes counts."""
    story = Story()
    story.run(20)
    story.wall += step_s
    story.run(20)
    assert set(story.actions) == {"none"}


def test_healthy_and_busy_kings_cause_no_questions() -> None:
    """The servers are asked only about what stands still."""
    story = Story()
    for second in range(30):
        story.content["last_delivery_at"] = second
        story.run(1)
    assert story.questions == 0


def test_idleness_beside_a_backlog_is_nudged_and_then_a_stall() -> None:
    """It counts from the first look that found messages."""
    story = Story()
    story.run(30)
    assert set(story.actions) == {"none"}
    story.backlog = 3
    story.run(14)
    assert story.first["nudge"] in (30 + 6, 30 + 7)
    assert story.first["restart"] in (30 + 11, 30 + 12)


@pytest.mark.parametrize("moved", ["last_delivery_at", "counters", "in_flight", "depth"])
def test_anything_that_moves_ends_the_starvation(moved: str) -> None:
    """A delivery, an outcome, work in flight, or an empty queue."""
    story = Story()
    story.backlog = 3
    for second in range(60):
        here = second % 8 == 7
        if moved == "depth":
            story.backlog = 0 if here else 3
        elif moved == "in_flight":
            story.content["in_flight"] = int(here)
        else:
            story.content[moved] = second // 8
        story.run(1)
    assert "restart" not in story.actions


@pytest.mark.parametrize(("away_s", "stalled"), [(1, True), (4, True), (6, False)])
def test_connecting_anew_ends_no_starvation_but_an_outage_does(away_s: int, stalled: bool) -> None:
    """Each nudge makes the King connect anew, and its file may show that: it has cured nothing."""
    story = Story()
    story.backlog = 3
    for second in range(60):
        story.phase = "broker_down" if second % 9 >= 9 - away_s else "serving"
        story.run(1)
    assert ("restart" in story.actions) == stalled


def test_an_unreachable_broker_is_no_backlog() -> None:
    """The probe's failure is reported, and nothing is done."""
    story = Story()
    story.backlog = None
    story.run(60)
    assert set(story.actions) <= {"wait", "none"}


def test_work_past_its_deadline_counts_only_while_serving() -> None:
    """Posts in flight during an outage get their whole deadline again."""
    story = Story()
    story.content["in_flight"] = 1
    story.phase = "store_down"
    for second in range(50):
        story.content["oldest_in_flight_s"] = float(second)
        story.run(1)
    story.phase = "serving"
    for second in range(50, 85):
        story.content["oldest_in_flight_s"] = float(second)
        story.run(1)
    # 20 s of deadline and 10 s of margin after the outage of 50 s.
    assert story.first["restart"] == 50 + 32


def test_another_kings_file_says_nothing() -> None:
    """Another process wrote it, perhaps one that had the same PID: no word yet."""
    story = Story()
    story.writer = "boot-4"
    assert story.run(1).phase is None


def test_a_new_process_begins_a_new_story() -> None:
    story = Story()
    story.frozen = {"main"}
    assert story.run(9).tick_ages["main"] == 8
    story.process = story.writer = "boot-6"
    assert story.run(1).tick_ages["main"] == 0


def test_a_full_disk_is_not_the_kings_fault(tmp_path: Path) -> None:
    """An old health file proves nothing when nobody can write a new one."""
    story = Story(health_file=tmp_path / "missing" / "king.json")
    story.frozen = {"main"}
    story.run(30)
    assert "restart" not in story.actions
    assert story.actions[-1] == "alarm"


LIMITS = Settings(
    watchdog=WatchdogSettings(stall_s=60, start_timeout_s=900),
    king=KingSettings(post_deadline_s=300, lease_s=60, drain_timeout_s=30),
)


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
    decision = decide(observation, LIMITS)
    assert (decision.action, decision.reason) == (action, decision.reason)
    assert told in decision.reason
    assert "\n" not in decision.reason


NOW = 1_700_000_000.0


def health(now: float = NOW, **changes: Any) -> dict[str, Any]:
    """A King of this process that serves and has nothing to do."""
    return {
        "pid": os.getpid(),
        "process": process_identity(os.getpid()),
        "started_at": now - 5000,
        "updated_at": now,
        "phase": "serving",
        "ticks": dict.fromkeys(THREADS, now - 0.5),
        "last_delivery_at": now - 3000,
        "last_done_at": now - 3000,
        "in_flight": 0,
        "oldest_in_flight_s": 0.0,
        "queue_depth": 0,
        "counters": {},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "well"),
    [
        ({}, True),
        ({"phase": "loading", "started_at": NOW - 800}, True),
        ({"phase": "loading", "started_at": NOW - 1000}, False),
        ({"phase": "store_down"}, True),
        ({"phase": "broker_down"}, True),
        ({"phase": "draining", "in_flight": 3, "oldest_in_flight_s": 290.0}, True),
        ({"ticks": {**dict.fromkeys(THREADS, NOW), "store": NOW - 70}}, False),
        ({"ticks": {}, "updated_at": NOW - 70}, False),
        ({"in_flight": 2, "oldest_in_flight_s": 299.0}, True),
        ({"in_flight": 2, "oldest_in_flight_s": 400.0}, False),
        ({"phase": "store_down", "in_flight": 2, "oldest_in_flight_s": 400.0}, True),
        ({"queue_depth": 5}, False),
        ({"queue_depth": 5, "in_flight": 1}, True),
        ({"queue_depth": 5, "last_delivery_at": NOW - 10}, True),
        ({"queue_depth": 5, "last_delivery_at": None, "last_done_at": None}, False),
        ({"process": "another"}, False),
    ],
)
def test_progress_is_what_counts(changes: dict[str, Any], well: bool) -> None:
    decision = judge(Settings(), health(**changes), NOW)
    assert (decision.action not in ("restart", "alarm")) is well, decision


@pytest.mark.parametrize(
    ("content", "arguments", "code", "said"),
    [
        (None, [], 1, "not well: the King has written no "),
        ({}, [], 0, "well: the King makes progress\n"),
        ({}, ["--ready"], 0, "well: the King makes progress\n"),
        ({"phase": "loading"}, [], 0, "well: the King is still loading\n"),
        ({"phase": "loading"}, ["--ready"], 1, "not ready: the King is loading\n"),
        ({"process": "another"}, ["--ready"], 1, "not well: the King is gone"),
    ],
)
def test_the_exit_code_says_it_with_a_line(
    *,
    content: dict[str, Any] | None,
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "king.json"
    if content is not None:
        now = time.time()
        file.write_text(json.dumps(health(now, started_at=now - 100, **content)))
    assert main([*arguments, "--set", f"king.health_file={file}"]) == code
    assert capsys.readouterr().out.startswith(said)


def test_a_mistake_in_the_settings_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", "king.helth_file=x"]) == 2
    assert "king.helth_file" in capsys.readouterr().err
