"""From health files to durations, on a clock that the test moves."""

import os
from pathlib import Path
from typing import Any

import pytest

from config.settings import KingSettings, Settings, WatchdogSettings
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
    seen = story.run(12)
    assert seen.tick_ages[thread] == 12
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
def test_connecting_anew_does_not_end_the_starvation_but_an_outage_does(
    away_s: int, stalled: bool
) -> None:
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
