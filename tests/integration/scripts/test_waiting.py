"""A server that is away or deaf: what waits for it says so within seconds, and for how long."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT

AWAY = "mongodb://127.0.0.1:1"


@pytest.fixture
def deaf() -> Iterator[str]:
    """The URL of a broker that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


def test_who_waits_says_so_and_for_how_long(tmp_path: Path, deaf: str) -> None:
    """No output on a terminal: these are pipes. Each is asked to end as soon as it has spoken."""
    folders = ["--set", f"embedded.folder={tmp_path / 'e'}"]
    folders += ["--set", f"king.health_file={tmp_path / 'king.json'}"]
    store = ["--set", f"store.url={AWAY}", "--set", "store.timeout_s=4"]
    broker = ["--set", f"broker.url={deaf}", "--set", "broker.socket_timeout_s=4"]
    patient = [word.replace("_s=4", "_s=90") for word in (*store, *broker)]
    asked = {
        # First, since its workers begin to load models. Without the embedded Redis, which would
        # outlive a King that is killed.
        "work": (["work", *patient], "king.waiting", "until it answers", -9),
        "show": (["show", "p", *store], f"database {AWAY}: no answer yet", "at most 4 s", 1),
        "publish": (["publish", "p", *broker], f"broker {deaf}: no answer yet", "at most 4 s", 1),
        "pull": (
            ["pull", "--out", str(tmp_path / "p.jsonl"), *store],
            f"database {AWAY}: no answer yet",
            "at most 91 s",
            1,
        ),
    }
    environment = {**os.environ, "INSIGHTTAG_LOG__FORMAT": "pretty", "NO_COLOR": "1"}
    begun = {
        name: subprocess.Popen(
            [sys.executable, "-m", "scripts.cli", *words, *folders],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for name, (words, *_) in asked.items()
    }
    for name, process in begun.items():
        _, told, how_long, code = asked[name]
        assert process.stderr is not None
        lines: list[str] = []
        while told not in "".join(lines[-1:]):
            lines.append(process.stderr.readline())
            assert lines[-1], (name, lines)
        assert how_long in lines[-1].replace("'", "").replace("=", " "), name
        if name == "pull":
            process.send_signal(signal.SIGTERM)
        if name == "work":  # its workers load models, and would be waited for
            process.kill()
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == code, (name, lines, rest)
