"""Floors of benchmarks: what is below one is said in a phrase."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from floors import FILE, broken_floors, finish
from results_file import FOLDER

ROWS = [
    {"broker": "redis", "posts_per_s": 90, "cpu_ms": {"king": 1.2}, "busy": None},
    {"broker": "rabbitmq", "posts_per_s": 110, "cpu_ms": {"king": 1.6}},
]
FLOORS = yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("floor", "broken"),
    [
        ({"figure": "posts_per_s", "least": 90}, []),
        ({"figure": "posts_per_s", "least": 91}, ["posts_per_s is 90, at least 91 is wanted"]),
        (
            {"where": {"broker": "rabbitmq"}, "figure": "cpu_ms.king", "most": 1.5},
            ["cpu_ms.king rabbitmq is 1.6, at most 1.5 is wanted"],
        ),
        ({"where": {"broker": "redis"}, "figure": "cpu_ms.king", "most": 1.5}, []),
        (
            {"where": {"broker": "redis"}, "figure": "busy", "least": 60},
            ["busy redis was not measured"],
        ),
        (
            {"where": {"broker": "rabbitmq"}, "figure": "gpu.busy", "least": 60},
            ["gpu.busy rabbitmq was not measured"],
        ),
        ({"where": {"broker": "none"}, "figure": "posts_per_s", "least": 1000}, []),
    ],
)
def test_a_figure_below_its_floor_is_named(floor: dict[str, Any], broken: list[str]) -> None:
    assert broken_floors(ROWS, [floor]) == broken


@pytest.mark.parametrize("name", FLOORS)
def test_every_floor_holds_for_figures_that_were_written(name: str) -> None:
    rows = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["results"]
    devices = {None, *(row.get("device") for row in rows)}
    for floor in FLOORS[name]:
        where = floor["where"].items()
        if floor["where"].get("device") not in devices:
            continue  # of a device that this machine has not
        assert any(all(row.get(key) == value for key, value in where) for row in rows), floor
    assert broken_floors(rows, FLOORS[name]) == []


def test_runs_below_a_floor_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"system": "daemon", "broker": "redis", "case": "text"}
    row |= {"cpu_ms": {"king": 99}, "machinery_cpu_ms": 0, "idle_percent_daemon": 0}
    assert finish("overhead", 1, [row], tmp_path, check=False) == 0
    assert finish("overhead", 1, [row], tmp_path) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("overhead: cpu_ms.king daemon redis text is 99, at most ")
