"""The shipped supervisord.conf and the watchdog, under a real supervisord."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.errors import RetryableError
from deploy.supervisor import SupervisorClient
from tests.support.deploy.checkout import Checkout, eventually

KING = '''
"""Stands in for the King: writes its health file every 0.1 s and ends on SIGTERM."""
import json, os, pathlib, signal, subprocess, sys, time
stat = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
code = pathlib.Path("exit_code")
if code.exists():
    sys.exit(int(code.read_text()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
file = pathlib.Path("workshop/run/king.json")
while True:
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"pid": os.getpid(), "process": f"{boot}-{stat[19]}",
                                "updated_at": time.time(), "phase": "serving"}))
    part.replace(file)
    time.sleep(0.1)
'''

SETTINGS = """
broker: {url: "redis://127.0.0.1:1/0"}
store: {url: "mongodb://127.0.0.1:1/"}
watchdog: {stall_s: 3, interval_s: 0.2, start_timeout_s: 30, rpc_timeout_s: 5}
log: {format: json}
"""


@pytest.fixture
def checkout(short_path: Path) -> Iterator[Checkout]:
    made = Checkout(short_path, KING, SETTINGS)
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
    assert "main thread last moved" in log
    # The replacement writes, so the watchdog is content again.
    assert eventually(
        lambda: "makes progress" in checkout.watchdog_log().split('"action": "restart"')[1]
    ), checkout.logs()

    running = checkout.client.program().pid
    started = time.monotonic()
    checkout.stop()
    assert time.monotonic() - started < 40
    assert not psutil.pid_exists(running)
    assert checkout.watchdog_log().count('"action": "restart"') == 1


def test_refused_configuration_is_not_restarted_and_a_crash_is(checkout: Checkout) -> None:
    """Exit 2 is final, and told again and again; after death by a signal it is started again."""
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
    os.kill(checkout.client.program().pid, signal.SIGKILL)
    assert eventually(lambda: checkout.watchdog_log().count("the King is FATAL") >= 2)
    assert checkout.client.program().state == "FATAL"
    assert (checkout.run / "supervisord.log").read_text().count("exit status 2") == 1


def test_supervisor_errors_are_one_line(short_path: Path) -> None:
    import socket

    with pytest.raises(RetryableError, match="No such file"):
        SupervisorClient(f"unix://{short_path}/none.sock", "king", 1).program()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short_path / "deaf.sock"))
        server.listen(1)
        started = time.monotonic()
        with pytest.raises(RetryableError, match="timed out"):
            SupervisorClient(f"unix://{short_path}/deaf.sock", "king", 0.5).kill()
        assert time.monotonic() - started < 20


def test_unknown_program_is_named(checkout: Checkout) -> None:
    checkout.start()
    client = SupervisorClient(f"unix://{checkout.run}/supervisor.sock", "queen", 5)
    with pytest.raises(RetryableError, match="queen: no such program"):
        client.program()
