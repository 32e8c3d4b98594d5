"""The shipped supervisord.conf and the watchdog, under a real supervisord."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import deploy
from config.errors import RetryableError
from deploy.supervisor import SupervisorClient

ROOT = Path(deploy.__file__).resolve().parents[1]

KING = '''
"""Stands in for the King: writes its health file every 0.1 s and ends on SIGTERM."""
import json, os, pathlib, signal, subprocess, sys, time
code = pathlib.Path("exit_code")
if code.exists():
    sys.exit(int(code.read_text()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
file = pathlib.Path("workshop/run/king.json")
while True:
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"pid": os.getpid(), "updated_at": time.time(), "phase": "running"}))
    part.replace(file)
    time.sleep(0.1)
'''

SETTINGS = """
broker: {url: "redis://127.0.0.1:1/0"}
store: {url: "mongodb://127.0.0.1:1/"}
watchdog: {stall_s: 1.5, interval_s: 0.2, start_timeout_s: 30, rpc_timeout_s: 5}
log: {format: json}
"""


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if check():
                return True
        except (RetryableError, OSError, psutil.Error):
            pass
        time.sleep(0.05)
    return False


class Checkout:
    """A folder laid out like a checkout, with the shipped configuration and a stand-in King."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "workshop" / "run"
        self.run.mkdir(parents=True)
        (folder / "deploy").mkdir()
        conf = (ROOT / "deploy" / "supervisord.conf").read_text()
        # Only the patience is shortened, for the tests' sake.
        conf = conf.replace("startsecs=3", "startsecs=1")
        (folder / "deploy" / "supervisord.conf").write_text(conf)
        (folder / "online_process.py").write_text(KING)
        (folder / "settings.yaml").write_text(SETTINGS)
        self.client = SupervisorClient(f"unix://{self.run}/supervisor.sock", "king", 5)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "KING_ARGS": "--config settings.yaml",
        }
        conf = self.folder / "deploy" / "supervisord.conf"
        # Started from elsewhere: nothing in the configuration may depend on the current folder.
        with (self.folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(conf)],
                cwd="/",
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        assert eventually(lambda: self.client.program().state == "RUNNING"), self.logs()

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(30)
            for child in psutil.wait_procs(children, 5)[1]:
                child.kill()

    def logs(self) -> str:
        files = [*self.run.glob("*.log"), self.folder / "out"]
        return "\n".join(f.read_text() for f in files if f.exists())

    def watchdog_log(self) -> str:
        return (self.run / "watchdog.log").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_stopped_king_is_restarted_and_a_clean_stop_is_not(checkout: Checkout) -> None:
    """A King that hangs (SIGSTOP) is replaced; supervisord then ends everything on SIGTERM."""
    checkout.start()
    assert eventually(lambda: '"action": "none"' in checkout.watchdog_log()), checkout.logs()
    hung = checkout.client.program().pid
    os.kill(hung, signal.SIGSTOP)
    assert eventually(
        lambda: (
            checkout.client.program().pid not in (0, hung)
            and checkout.client.program().state == "RUNNING"
        )
    ), checkout.logs()
    assert not psutil.pid_exists(hung)
    log = checkout.watchdog_log()
    assert log.count('"action": "restart"') == 1
    assert "king's health file is" in log.lower()
    # The replacement writes, so the watchdog is content again.
    assert eventually(lambda: checkout.watchdog_log().count("makes progress") == 2)

    running = checkout.client.program().pid
    started = time.monotonic()
    checkout.stop()
    assert time.monotonic() - started < 15
    assert not psutil.pid_exists(running)
    assert checkout.watchdog_log().count('"action": "restart"') == 1


def test_refused_configuration_is_not_restarted_and_a_crash_is(checkout: Checkout) -> None:
    """Exit 2 stays EXITED, since no restart repairs it; death by a signal is restarted at once."""
    checkout.start()
    first = checkout.client.program().pid
    os.kill(first, signal.SIGKILL)
    assert eventually(
        lambda: (
            checkout.client.program().pid not in (0, first)
            and checkout.client.program().state == "RUNNING"
        )
    )
    (checkout.folder / "exit_code").write_text("2")
    time.sleep(1.2)  # past startsecs, or supervisord counts it as a failed start
    os.kill(checkout.client.program().pid, signal.SIGKILL)
    assert eventually(lambda: checkout.client.program().state in {"EXITED", "FATAL", "BACKOFF"})


def test_supervisor_errors_are_one_line(tmp_path: Path) -> None:
    """No socket, and a socket that never answers, both become a RetryableError in time."""
    import socket

    with pytest.raises(RetryableError, match="No such file"):
        SupervisorClient(f"unix://{tmp_path}/none.sock", "king", 1).program()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "deaf.sock"))
        server.listen(1)
        started = time.monotonic()
        with pytest.raises(RetryableError, match="timed out"):
            SupervisorClient(f"unix://{tmp_path}/deaf.sock", "king", 0.5).kill()
        assert time.monotonic() - started < 3


def test_unknown_program_is_named(checkout: Checkout) -> None:
    """A wrong watchdog.program says which program supervisord does not know."""
    checkout.start()
    client = SupervisorClient(f"unix://{checkout.run}/supervisor.sock", "queen", 5)
    with pytest.raises(RetryableError, match="queen: no such program"):
        client.program()
