"""supervisord (XML-RPC over its unix socket) and systemd, every call with a time-out."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import xmlrpc.client
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import RetryableError, one_line
from common.processes import process_identity
from config.settings import WatchdogSettings

_GONE_FAULTS = {10: "no such program", 70: "not running"}
# Exit status of a refused configuration, after which nobody starts the program again.
_REFUSED_STATUS = 2


@dataclass(frozen=True)
class Program:
    """State of one program in supervisord's words: ``RUNNING``, ``BACKOFF``, ``EXITED``, ...

    The PID is 0 when it does not run; ``identity`` is that of `common.processes`.
    """

    state: str
    pid: int
    identity: str | None


class Supervisor(Protocol):
    """The process that starts the King again."""

    def program(self) -> Program:
        """Return the watched program; RetryableError when the supervisor does not answer."""
        ...

    def kill(self) -> None:
        """End the watched program at once, so that the supervisor starts it again."""
        ...


class SupervisorClient:
    """supervisord behind its unix socket."""

    def __init__(self, url: str, program: str, timeout_s: float) -> None:
        self._socket_path = url.removeprefix("unix://")
        self._name = program
        self._timeout_s = timeout_s

    def program(self) -> Program:
        info = self._call("getProcessInfo", self._name)
        state, pid = str(info["statename"]), int(info["pid"])
        if state == "EXITED" and info["exitstatus"] == _REFUSED_STATUS:
            state = "FATAL"
        return Program(state, pid, process_identity(pid))

    def kill(self) -> None:
        """Send SIGKILL through supervisord, which starts the program again.

        A program without progress is past SIGTERM: asking would cost the whole drain limit.
        """
        self._call("signalProcess", self._name, "KILL")

    def _call(self, method: str, *arguments: str) -> Any:
        transport = _UnixTransport(self._socket_path, self._timeout_s)
        try:
            # The host is never resolved: the transport opens the socket file.
            with xmlrpc.client.ServerProxy("http://supervisor/RPC2", transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as error:
            reason = _GONE_FAULTS.get(error.faultCode, error.faultString)
            raise RetryableError(f"supervisor: {self._name}: {reason}") from error
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            reason = one_line(error)
            raise RetryableError(f"supervisor at {self._socket_path}: {reason}") from error


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("supervisor", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket file instead of a host and port."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            raise
        self.sock = connection


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__()
        self._path = path
        self._timeout_s = timeout_s

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """Return one connection to the socket file, with a time-out."""
        connection = _UnixConnection(self._path, self._timeout_s)
        self._connection = (host, connection)
        return connection


_STATES = {
    "active": "RUNNING",
    "reloading": "RUNNING",
    "activating": "STARTING",
    "deactivating": "STOPPING",
    "inactive": "STOPPED",
    "failed": "FATAL",
}
_PROPERTIES = ("LoadState", "ActiveState", "SubState", "MainPID")


class SystemdClient:
    """A unit of systemd: ``systemctl show``, and a signal to its main process."""

    def __init__(self, unit: str, timeout_s: float) -> None:
        self._unit = unit
        self._timeout_s = timeout_s

    def program(self) -> Program:
        facts = self._show()
        if facts.get("LoadState") == "not-found":
            raise RetryableError(f"systemd: {self._unit}: no such unit")
        pid = int(facts.get("MainPID") or 0)
        state = _STATES.get(facts.get("ActiveState", ""), "UNKNOWN")
        if facts.get("SubState") == "auto-restart":
            state = "BACKOFF"
        return Program(state, pid, process_identity(pid))

    def kill(self) -> None:
        """Kill the main process; Restart= of the unit starts it again."""
        pid = int(self._show().get("MainPID") or 0)
        if pid == 0:
            raise RetryableError(f"systemd: {self._unit}: not running")
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError as error:
            raise RetryableError(f"systemd: {self._unit}: pid {pid}: {error.strerror}") from error

    def _show(self) -> dict[str, str]:
        command = ["systemctl", "show", self._unit, f"--property={','.join(_PROPERTIES)}"]
        try:
            # The unit's name comes from our own settings, and no shell reads it.
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=self._timeout_s, check=True
            )
        except subprocess.CalledProcessError as error:
            reason = " ".join((error.stderr or "").split()) or f"exit code {error.returncode}"
            raise RetryableError(f"systemd: {self._unit}: {reason}") from error
        except (OSError, subprocess.SubprocessError) as error:
            raise RetryableError(
                f"systemd: {self._unit}: {' '.join(str(error).split())}"
            ) from error
        pairs = (line.partition("=") for line in done.stdout.splitlines())
        return {name: value for name, _, value in pairs}


def open_supervisor(limits: WatchdogSettings) -> Supervisor:
    """Return the supervisor that ``watchdog.supervisor_url`` names."""
    if limits.supervisor_url == "systemd":
        return SystemdClient(limits.program, limits.rpc_timeout_s)
    return SupervisorClient(limits.supervisor_url, limits.program, limits.rpc_timeout_s)
