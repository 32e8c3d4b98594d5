"""The edge to supervisord: XML-RPC over its unix socket, every call with a time-out."""

from __future__ import annotations

import http.client
import socket
import xmlrpc.client
from dataclasses import dataclass
from typing import Any, Protocol

from common.errors import RetryableError

_GONE_FAULTS = {10: "no such program", 70: "not running"}


@dataclass(frozen=True)
class Program:
    """What supervisord says of one program.

    Attributes:
        state: ``RUNNING``, ``STARTING``, ``BACKOFF``, ``STOPPING``, ``EXITED``, ``FATAL``, …
        pid: 0 when it does not run.
        started_at: Unix time of its last start, whole seconds.
    """

    state: str
    pid: int
    started_at: float


class Supervisor(Protocol):
    """What the watchdog needs of a supervisor."""

    def program(self) -> Program:
        """The watched program.

        Raises:
            RetryableError: The supervisor does not answer in time, or does not know it.
        """
        ...

    def kill(self) -> None:
        """End the watched program at once, so that the supervisor starts it again.

        Raises:
            RetryableError: The supervisor does not answer in time, or refuses.
        """
        ...


class SupervisorClient:
    """supervisord behind its unix socket."""

    def __init__(self, url: str, program: str, timeout_s: float) -> None:
        self._socket_path = url.removeprefix("unix://")
        self._name = program
        self._timeout_s = timeout_s

    def program(self) -> Program:
        """See `Supervisor.program`."""
        info = self._call("getProcessInfo", self._name)
        return Program(
            state=str(info["statename"]), pid=int(info["pid"]), started_at=float(info["start"])
        )

    def kill(self) -> None:
        """See `Supervisor.kill`.

        A program that has stopped making progress is past SIGTERM: asking politely would only
        cost the whole drain limit. Its children die with it; its messages are redelivered.
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
            reason = " ".join(str(error).split()) or type(error).__name__
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
        """One connection to the socket file, with a time-out; `close` closes what is kept here."""
        connection = _UnixConnection(self._path, self._timeout_s)
        self._connection = (host, connection)
        return connection
