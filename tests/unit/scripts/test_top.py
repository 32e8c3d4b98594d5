"""``insighttag top``: what a look holds, and how it is shown."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.processes import process_identity
from config.load import load_settings
from king.status import Status, write_health
from scripts.cli import run
from scripts.commands.top import Looks, line, read_gpus, screen


def health(path: Path, *done: int, process: str | None = None) -> None:
    """Write the health file of a King in this process, whose workers have answered tasks."""
    status = Status()
    status.count("tagged", 1234)
    names = [
        ("decode-0", "decode", "cpu"),
        ("extract-0", "extract", "cuda:0"),
        ("fuse", "fuse", "cpu"),
    ]
    status.workers = [
        {"name": name, "role": role, "device": device, "state": "ready", "pid": os.getpid()}
        | {"held": 3, "done": number, "deaths": 0}
        for (name, role, device), number in zip(names, done, strict=True)
    ]
    content = status.snapshot(in_flight=9, oldest_in_flight_s=1.5)
    write_health(path, {**content, "process": process or process_identity(os.getpid())})


@pytest.fixture
def looks(tmp_path: Path) -> Looks:
    """Looks at a King without queue and database; the clock moves by 1 s when it is asked."""
    overrides = [f"king.health_file={tmp_path / 'king.json'}", f"embedded.folder={tmp_path / 'e'}"]
    settings = load_settings(overrides=overrides)
    ticks = iter(range(100))
    return Looks(lambda: settings, settings, clock=lambda: float(next(ticks)))


def shown(look: dict[str, Any], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(screen(look))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_rates_are_those_between_two_looks(looks: Looks, tmp_path: Path) -> None:
    health(tmp_path / "king.json", 0, 10, 100)
    first = looks.look()
    assert {name: of["tasks_per_s"] for name, of in first["stages"].items()} == {
        "decode": 0,
        "extract": 0,
        "fuse": 0,
    }
    health(tmp_path / "king.json", 8, 10, 104)
    second = looks.look()
    # The clock has moved by two: each look asks it, and the first asked the services, too.
    assert [worker["tasks_per_s"] for worker in second["workers"]] == [4, 0, 2]
    assert second["stages"]["extract"]["in_flight"] == 3
    assert second["workers"][0]["memory_bytes"] > 1 << 20


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_the_terminal(width: int, looks: Looks, tmp_path: Path) -> None:
    health(tmp_path / "king.json", 1, 2, 3)
    failure = {"post_id": "p" * 90, "stage": "fetch", "type": "FetchRefused", "message": "m" * 200}
    look = {**looks.look(), "failures": [{**failure, "at": time.time() - 90}]}
    look["machine"]["gpus"] = read_gpus("0, 87, 10240, 143771\n")
    rows = shown(look, width)
    assert max(map(len, rows)) <= width
    text = "\n".join(rows)
    assert len(rows) < 24  # a terminal's height
    for told in ("the embedded service is not running", "9 in flight", "extract-0", "cuda:0"):
        assert told in text
    assert "GPU 0 87%, 10.0 of 140.4 GiB" in text
    assert "1.5 min ago" in text
    assert "fetch" in text


def test_a_line_says_it_all(looks: Looks, tmp_path: Path) -> None:
    health(tmp_path / "king.json", 1, 2, 3)
    said = line(looks.look())
    assert "\n" not in said
    for told in ("9 in flight", "decode 3 extract 3 fuse 3", "1,234 tagged, 0 failed", "CPU "):
        assert told in said


@pytest.mark.parametrize(("process", "told"), [("other", "last seen"), (None, "not running")])
def test_no_king_no_workers(process: str | None, told: str, looks: Looks, tmp_path: Path) -> None:
    if process is not None:
        health(tmp_path / "king.json", 1, 2, 3, process=process)
    look = looks.look()
    assert look["workers"] == []
    assert told in line(look)
    assert told in "\n".join(shown(look, 80))


@pytest.mark.parametrize(
    ("text", "gpus"), [("", []), ("0, 5, 1, 2\n1, 6, 3, 4\n", [(0, 5, 1, 2), (1, 6, 3, 4)])]
)
def test_lines_of_nvidia_smi(text: str, gpus: list[tuple[float, ...]]) -> None:
    assert [tuple(each.values()) for each in read_gpus(text)] == gpus
    assert read_gpus("0, [N/A], 1, 2") == [{"index": 0, "used_mib": 1, "total_mib": 2}]


def test_once_is_a_document_or_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["top", "--once", "--set", f"king.health_file={tmp_path / 'king.json'}"]
    words += ["--set", f"embedded.folder={tmp_path / 'e'}"]
    assert run([*words, "--json"]) == 0
    look = json.loads(capsys.readouterr().out)
    assert set(look) >= {"queue", "store", "king", "stages", "workers", "machine", "failures"}
    assert run(words) == 0
    assert "not running" in capsys.readouterr().out
    assert not (tmp_path / "e").exists()
