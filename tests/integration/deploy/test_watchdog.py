"""The watchdog's actions: nudge, dump, kill, within a budget, each with a log line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog

from common.errors import RetryableError
from common.processes import process_identity
from config.load import load_settings
from config.settings import Settings, WatchdogSettings
from deploy.supervisor import Program, SystemdClient, open_supervisor
from deploy.watchdog import (
    Observation,
    Progress,
    Watchdog,
    catches,
    main,
    waiting_messages,
    write_stacks,
)
from king.king import SUBSCRIBE_SIGNAL
from king.status import DUMP_SIGNAL, dumped_on_signal, stack_file
from tests.support.services import RedisServer

SLEEPER = """
import pathlib, signal, sys, threading
from king.status import dumped_on_signal
got = []
signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path(sys.argv[1]).write_text("nudged"))
def a_blocked_thread(): threading.Event().wait()
with dumped_on_signal(pathlib.Path(sys.argv[2])):
    threading.Thread(target=a_blocked_thread, daemon=True, name="busy").start()
    print("ready", flush=True)
    while True: signal.pause()
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with the King's two signals."""
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "nudge"), str(tmp_path / "king.json")]
    process: Any = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


class FakeSupervisor:
    """Runs nothing; counts the kills."""

    def __init__(self, pid: int = 0, error: str | None = None) -> None:
        self.pid = pid or os.getpid()
        self.kills = 0
        self.error = error

    def program(self) -> Program:
        if self.error:
            raise RetryableError(self.error)
        return Program("RUNNING", self.pid, "boot-5")

    def kill(self) -> None:
        self.kills += 1


class FakeProgress(Progress):
    """Says what the test wants it to."""

    seen: Observation
    forgotten = 0

    def observe(self, *_: object) -> Observation:
        return self.seen

    def forget(self) -> None:
        super().forget()
        self.forgotten += 1


def settings_in(tmp_path: Path, **watchdog: float) -> Settings:
    config = tmp_path / "settings.yaml"
    config.write_text("broker: {url: 'redis://127.0.0.1:1/0'}\nstore: {url: 'mongodb://x/'}\n")
    changes = [f"watchdog.{key}={value}" for key, value in watchdog.items()]
    return load_settings(config, (f"king.health_file={tmp_path / 'king.json'}", *changes))


def watched(settings: Settings, supervisor: FakeSupervisor) -> tuple[Watchdog, FakeProgress]:
    progress = FakeProgress(settings, lambda: 0)
    return Watchdog(settings, supervisor, progress), progress


def stalled(pid: int = 7, seen_s: float = 100.0) -> Observation:
    return Observation(Program("RUNNING", pid, "boot-5"), seen_s, "serving", 90.0, {"main": 61.0})


def test_a_stalled_king_is_killed_until_the_budget_is_spent(tmp_path: Path) -> None:
    """Each restart logs one line; past the budget every round is loud, and nothing is killed."""
    supervisor = FakeSupervisor(pid=2**22 - 1)
    watchdog, progress = watched(settings_in(tmp_path, restarts=2, dump_s=0.1), supervisor)
    progress.seen = stalled(supervisor.pid)
    with structlog.testing.capture_logs() as logs:
        for _ in range(4):
            watchdog.tick()
    assert supervisor.kills == 2
    events = [entry["event"] for entry in logs]
    assert events == ["watchdog.decision"] * 2 + ["watchdog.restart_withheld"] * 2
    assert {"main thread last moved 61 s ago" in entry["reason"] for entry in logs} == {True}
    assert logs[2]["log_level"] == "error"
    assert logs[2]["because"] == "2 restarts in 1800 s are used up"


def test_a_king_that_ends_meanwhile_is_not_killed(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(pid=2**22 - 1)
    watchdog, progress = watched(settings_in(tmp_path, dump_s=0.1), supervisor)
    progress.seen = stalled(pid=2**22 - 2)
    watchdog.tick()
    assert supervisor.kills == 0


def test_the_nudge_is_one_signal(tmp_path: Path, sleeper: subprocess.Popen[str]) -> None:
    """A starving King gets SIGUSR1 once, with one log line, and lives on."""
    supervisor = FakeSupervisor(pid=sleeper.pid)
    watchdog, progress = watched(settings_in(tmp_path), supervisor)
    program = Program("RUNNING", sleeper.pid, "boot-5")
    progress.seen = Observation(program, 100.0, "serving", 90.0, starved_s=31.0, backlog=2)
    with structlog.testing.capture_logs() as logs:
        watchdog.tick()
        assert eventually((tmp_path / "nudge").exists)
        (tmp_path / "nudge").unlink()
        watchdog.tick()
        time.sleep(0.2)
    assert not (tmp_path / "nudge").exists()
    assert [entry["action"] for entry in logs] == ["nudge"]
    assert sleeper.poll() is None


def test_a_process_without_the_handler_is_not_signalled(tmp_path: Path) -> None:
    """SIGUSR1 and SIGUSR2 would end it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not catches(process.pid, SUBSCRIBE_SIGNAL)
        watchdog, progress = watched(settings_in(tmp_path), FakeSupervisor(process.pid))
        program = Program("RUNNING", process.pid, "boot-5")
        progress.seen = Observation(program, 100.0, "serving", starved_s=31.0, backlog=2)
        watchdog.tick()
        write_stacks(process.pid, tmp_path / "king.json", "for the test", 0.1)
        time.sleep(0.1)
        assert process.poll() is None
        process.kill()


def test_a_stack_file_has_its_reason(tmp_path: Path, sleeper: subprocess.Popen[str]) -> None:
    """A King that runs writes its stacks; a stopped one is not waited for; both live on."""
    king = psutil.Process(sleeper.pid)
    assert eventually(lambda: king.status() == psutil.STATUS_SLEEPING)
    path = write_stacks(sleeper.pid, tmp_path / "king.json", "it hangs", 40)
    assert path == stack_file(tmp_path / "king.json")
    text = path.read_text()
    assert f"pid {sleeper.pid} (sleeping): it hangs" in text
    assert text.index("it hangs") < text.index("in a_blocked_thread")
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert eventually(lambda: king.status() == psutil.STATUS_STOPPED)
    began = time.monotonic()
    write_stacks(sleeper.pid, tmp_path / "king.json", "it is stopped", 40)
    assert time.monotonic() - began < 30
    assert f"pid {sleeper.pid} (stopped): it is stopped" in path.read_text()
    assert sleeper.poll() is None


def test_a_stack_file_that_cannot_be_written_hinders_nothing(tmp_path: Path) -> None:
    """No folder, no process: no exception."""
    assert write_stacks(2**22 - 1, tmp_path / "none" / "king.json", "x", 0.1) is None


def test_a_long_stack_file_is_set_aside_and_a_missing_folder_only_warned(tmp_path: Path) -> None:
    """The file is bounded; a King whose folder cannot be written starts all the same."""
    file = stack_file(tmp_path / "king.json")
    file.write_text("x" * 5 * 2**20)
    previous = signal.getsignal(DUMP_SIGNAL)
    try:
        with dumped_on_signal(tmp_path / "king.json"):
            assert file.stat().st_size == 0
            os.kill(os.getpid(), DUMP_SIGNAL)
            assert eventually(lambda: "test_a_long_stack_file" in file.read_text())
        (tmp_path / "a_file").write_text("")
        with (
            structlog.testing.capture_logs() as logs,
            dumped_on_signal(tmp_path / "a_file" / "king.json"),
        ):
            pass
    finally:
        signal.signal(DUMP_SIGNAL, previous)
    assert [entry["event"] for entry in logs] == ["king.stack_file_failed"]


def test_an_unreachable_supervisor_is_said_once(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(error="supervisor at x: no such file")
    with structlog.testing.capture_logs() as logs:
        watchdog = Watchdog(settings_in(tmp_path), supervisor)
        assert [watchdog.tick(), watchdog.tick()] == [None, None]
    assert [entry["event"] for entry in logs] == ["watchdog.supervisor_unreachable"]


def test_a_machine_asleep_stalls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the watchdog itself wakes far too late, every measurement starts over."""
    settings = settings_in(tmp_path, interval_s=0.01, stall_s=0.2)
    watchdog, progress = watched(settings, FakeSupervisor())
    progress.seen = Observation(Program("RUNNING", 7, "boot-5"), 1.0, "serving")
    before = progress.forgotten

    def sleep_long(_seconds: float, real: Callable[[float], None] = time.sleep) -> None:
        real(0.3)
        watchdog.stop()

    monkeypatch.setattr("deploy.watchdog.time.sleep", sleep_long)
    with structlog.testing.capture_logs() as logs:
        watchdog.run()
    assert progress.forgotten == before + 1
    assert [entry["event"] for entry in logs] == ["watchdog.slept"]


def test_the_queue_is_asked_with_a_limit(tmp_path: Path, redis_server: RedisServer) -> None:
    """A real server answers; a paused one, and an embedded one that is off, give None in time."""
    up = Settings.model_validate(
        {
            "broker": {"url": redis_server.url, "queue": "probe"},
            "watchdog": {"probe_timeout_s": 1.5},
        }
    )
    assert waiting_messages(up) == 0
    redis_server.pause()
    try:
        began = time.monotonic()
        assert waiting_messages(up) is None
        assert time.monotonic() - began < 25
    finally:
        redis_server.resume()
    off = Settings.model_validate({"embedded": {"folder": tmp_path / "embedded"}})
    assert waiting_messages(off) is None


SYSTEMCTL = """#!/bin/sh
test "$1 $2" = "show king.service" || { echo "Failed to connect to bus" >&2; exit 1; }
cat "$(dirname "$0")/answer"
"""


def test_systemd_is_another_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are translated, the main process is killed, and errors are one line."""
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    client = open_supervisor(WatchdogSettings(supervisor_url="systemd", program="king.service"))

    def answer(load: str, active: str, sub: str, pid: int) -> None:
        text = f"LoadState={load}\nActiveState={active}\nSubState={sub}\nMainPID={pid}\n"
        (tmp_path / "answer").write_text(text)

    with subprocess.Popen(["sleep", "60"]) as process:
        answer("loaded", "active", "running", process.pid)
        program = client.program()
        assert (program.state, program.pid) == ("RUNNING", process.pid)
        assert program.identity == process_identity(process.pid)
        client.kill()
        assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(RetryableError, match="No such process"):
        client.kill()
    answer("loaded", "activating", "auto-restart", 0)
    assert client.program().state == "BACKOFF"
    answer("loaded", "failed", "failed", 0)
    assert client.program().state == "FATAL"
    with pytest.raises(RetryableError, match="not running"):
        client.kill()
    answer("not-found", "inactive", "dead", 0)
    with pytest.raises(RetryableError, match="no such unit"):
        client.program()
    with pytest.raises(RetryableError, match="Failed to connect to bus"):
        SystemdClient("queen.service", 5).program()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(RetryableError, match="systemctl"):
        client.program()


def test_a_wrong_setting_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line, which supervisord does not restart."""
    config = tmp_path / "settings.yaml"
    config.write_text("{}")
    assert main(["--config", str(config), "--set", "watchdog.stall_s=soon"]) == 2
    error = capsys.readouterr().err
    assert "watchdog.stall_s" in error
    assert error.count("\n") == 1


def eventually(check: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False
