"""A short form of ``make fuzz``: the same program, fewer files."""

import json
from pathlib import Path

import fuzz
import pytest


@pytest.mark.redis
@pytest.mark.slow
def test_hostile_input_ends_somewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The King survives, and every post and message ends with a reason of ours."""
    words = ["--media", "40", "--messages", "54", "--seed", "3", "--timeout", "500"]
    words += ["--ids", "500", "--headers", "0"]  # tests/integration/king has headers
    fuzz.main([*words, "--out", str(tmp_path)])
    said = capsys.readouterr().out
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
    }, said[-3000:]
    assert "0 files and messages left behind" in said
    assert growth < 0.15, "few posts: the caches of the first ones still count"
    assert set(written) == {"machine", "date", "commit", "runs", "results"}
