"""One look at a health file: what is well, and what a container is restarted for."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.processes import process_identity
from config.settings import Settings
from deploy.probe import judge, main

NOW = 1_700_000_000.0
THREADS = ("main", "broker", "store", "dispatch")


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
