"""The edge to systemd: ``systemctl show``, and a signal to the unit's main process."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil

from common.errors import RetryableError
from deploy.supervisor import Program

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
    """A unit that systemd runs; see `deploy.supervisor.Supervisor`."""

    def __init__(self, unit: str, timeout_s: float) -> None:
        self._unit = unit
        self._timeout_s = timeout_s

    def program(self) -> Program:
        """See `Supervisor.program`."""
        facts = self._show()
        if facts.get("LoadState") == "not-found":
            raise RetryableError(f"systemd: {self._unit}: no such unit")
        pid = int(facts.get("MainPID") or 0)
        state = _STATES.get(facts.get("ActiveState", ""), "UNKNOWN")
        if facts.get("SubState") == "auto-restart":
            state = "BACKOFF"
        try:
            started_at = psutil.Process(pid).create_time() if pid else 0.0
        except psutil.Error:
            started_at = 0.0
        return Program(state=state, pid=pid, started_at=started_at)

    def kill(self) -> None:
        """See `Supervisor.kill`; Restart= of the unit starts it again."""
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
