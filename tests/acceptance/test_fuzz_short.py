"""A short form of ``make fuzz``: the same program, fewer files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.redis
@pytest.mark.slow
def test_hostile_files_and_messages_end_somewhere(tmp_path: Path) -> None:
    """The King survives, and every post and message ends with a reason of ours."""
    command = ["bench/fuzz.py", "--media", "40", "--messages", "54", "--seed", "3"]
    command += ["--ids", "500", "--headers", "0"]  # tests/integration/king has headers
    done = python(*command, "--out", str(tmp_path), "--timeout", "500", timeout_s=560)
    assert (tmp_path / "fuzz.json").exists(), done.stderr[-3000:]
    written = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
    growth = written["results"].pop("memory_growth")
    assert written["results"].pop("worker_lies") > 0
    assert written["results"] == {
        "media": 40,
        "messages": 54,
        "king_deaths": 0,
        "without_terminal_state": 0,
        "untyped": 0,
        "ids": 500,
        "headers": 0,
        "ids_and_headers_lost": 0,
    }, done.stdout[-3000:]
    assert "0 files and messages left behind" in done.stdout
    assert growth < 0.15, "few posts: the caches of the first ones still count"
    assert set(written) == {"machine", "date", "commit", "runs", "results"}
