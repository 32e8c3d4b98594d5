"""The status, the health file, and the names by which Kings know each other."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from king.broker.base import Delivery
from king.status import Status, read_health, write_health
from king.store_thread import InFlight


def test_health_file_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "king.json"
    seen = {"pid": 1, "updated_at": 2.0, "n": 0, "pad": "x" * 50_000}
    write_health(path, seen)
    stop = threading.Event()

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_health(path, {**seen, "n": number})

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(300):
            content: Any = read_health(path)
            assert len(content["pad"]) == 50_000
    finally:
        stop.set()
        writer.join()
    assert [p.name for p in path.parent.iterdir()] == ["king.json"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3"])
def test_unreadable_health_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "king.json"
    if content is not None:
        path.write_text(content)
    assert read_health(path) is None


def test_phases_follow_what_is_up() -> None:
    """The phase names what is missing; models that load are not a fault."""
    now = 0.0
    status = Status(lambda: now)
    seen: list[str] = [status.phase]

    def old() -> None:
        nonlocal now
        now += 2

    def drain() -> None:
        status.draining = True

    for change in (
        old,
        status.store_up.set,
        status.broker_up.set,
        status.ready.set,
        status.store_up.clear,
        drain,
    ):
        change()
        seen.append(status.phase)
    expected = ["starting", "store_down", "broker_down", "loading", "serving", "store_down"]
    assert seen == [*expected, "draining"]


def test_rate_is_over_the_last_minute() -> None:
    now = 0.0
    status = Status(lambda: now)
    now = 1000.0
    for _ in range(4):
        now += 20
        status.count("tagged", 30)
    seen = status.snapshot(in_flight=0, oldest_in_flight_s=0)
    assert seen["posts_per_s"] == pytest.approx(90 / 60)
    assert seen["counters"]["tagged"] == 120
    json.dumps(seen)


def test_a_post_is_held_by_one_delivery_of_the_present_connection() -> None:
    """A second message is superfluous; one that comes after a lost connection takes its place."""
    in_flight = InFlight()
    first, second, again = Delivery(b"p1", 1, 1), Delivery(b'"p1"', 2, 1), Delivery(b"p1", 1, 2)
    assert in_flight.add("p1", first) == "new"
    assert in_flight.add("p1", second) == "superfluous"
    assert in_flight.add("p1", again) == "again"
    assert len(in_flight) == 1
    assert in_flight.oldest_s >= 0
    assert list(in_flight.remove("p1")) == [again]
    assert list(in_flight.remove("p1")) == []
