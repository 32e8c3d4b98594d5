"""Detached child processes that a later command can find again, and be sure of.

A pid alone proves nothing: after a crash the system gives it to somebody else. A process is ours
when its pid, its start time and a marker in its command line all match what was recorded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.errors import ConfigError, RetryableError
from common.files import lock_file

LOOPBACK = "127.0.0.1"
_START_TIME_SLACK_S = 1.0  # psutil derives start times from the boot time, which may be adjusted


@dataclass(frozen=True)
class Identity:
    """Record of a detached process.

    Attributes:
        started_at: Unix time in seconds at which the system says that it started.
        marker: Text that stands in its command line, for example its configuration file.
    """

    pid: int
    started_at: float
    marker: str


def spawn(argv: Sequence[str], log: Path, marker: str) -> Identity:
    """Start a process in a session of its own, so that a Ctrl-C of the starter does not end it.

    Args:
        argv: Absolute path of the program and its arguments.
        log: File that standard output and error are appended to.
        marker: See `Identity`.

    Raises:
        ConfigError: The program or the log file cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # URLs with passwords are settings; a server of ours needs none of them in its environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INSIGHTTAG_")}
    # No Popen: it would warn that the child outlives it, which is the purpose.
    try:
        pid = os.posix_spawn(argv[0], list(argv), environment, file_actions=actions, setsid=True)
    except OSError as error:
        raise ConfigError(f"{argv[0]} cannot be started: {error}") from error
    try:
        started_at = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        started_at = time.time()
    return Identity(pid=pid, started_at=started_at, marker=marker)


def alive(identity: Identity) -> bool:
    """Tell whether the recorded process still runs, and no other has its PID."""
    # A child of this very process stays a zombie until it is waited for.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(identity.pid, os.WNOHANG)
    try:
        process = psutil.Process(identity.pid)
        if abs(process.create_time() - identity.started_at) > _START_TIME_SLACK_S:
            return False
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        command = process.cmdline()
        # Empty for some milliseconds after the start, and while Redis writes its own title.
        return not command or any(identity.marker in argument for argument in command)
    except psutil.Error:
        return False


def listens(identity: Identity, port: int) -> bool:
    """Tell whether the recorded process itself holds the port."""
    try:
        connections = psutil.Process(identity.pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in connections
        if connection.laddr
    )


def stop(identity: Identity, timeout_s: float = 10.0) -> bool:
    """End the recorded process: politely, then not; False when it was not running.

    Raises:
        RetryableError: It does not even end by SIGKILL within ``timeout_s``.
    """
    if not alive(identity):
        return False
    for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, timeout_s)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, number)
        if _gone(identity, wait_s):
            return True
    raise RetryableError(f"process {identity.pid} ({identity.marker}) does not end")


def _gone(identity: Identity, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not alive(identity):
            return True
        time.sleep(0.02)
    return not alive(identity)


def port_is_free(port: int) -> bool:
    """Tell whether a server could take this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def locked(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """Hold a lock file; the system frees it when its holder dies.

    Raises:
        RetryableError: Another process holds it for longer than ``timeout_s``.
    """
    try:
        lock = lock_file(path, timeout_s)
    except TimeoutError as error:
        raise RetryableError(
            f"{what}: another command holds {path} for over {timeout_s:g} s"
        ) from error
    try:
        yield
    finally:
        lock.release()


def last_lines(path: Path, count: int = 1, limit_bytes: int = 4096) -> str:
    """Return the end of a log file in one line, for error messages."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "no log"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:])[:300] or "its log is empty"
