"""One worker process: pinned from the start, one channel, dies with the King."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from workers.pool.channel import Channel, to_king
from workers.pool.launch import WorkerSpec
from workers.protocol import Launch, Reply

_ROOT = Path(__file__).resolve().parents[2]
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_STORE_KEYS = ("AWS_", "AZURE_", "GOOGLE_", "FSSPEC_")


def pinned_environment(spec: WorkerSpec, environ: dict[str, str]) -> dict[str, str]:
    """Return the environment of a worker, with what must be set before torch is imported.

    ``cuda:N`` counts in the devices that the King itself may see; the worker sees only that one,
    as ``cuda:0``.
    """
    # Settings come through the channel, without the URLs of broker and database: see `Launch`.
    pinned = {k: v for k, v in environ.items() if not k.upper().startswith("INSIGHTTAG_")}
    if spec.role not in (
        "cache",
        "extract",
    ):  # hostile files are opened there
        pinned = {k: v for k, v in pinned.items() if not k.upper().startswith(_STORE_KEYS)}
    pinned.update(dict.fromkeys(_THREAD_VARIABLES, str(spec.threads)))
    pinned["TOKENIZERS_PARALLELISM"] = "false"
    pinned.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    pinned["CUDA_VISIBLE_DEVICES"] = ""
    if spec.device.startswith("cuda:"):
        index = int(spec.device.removeprefix("cuda:"))
        visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        pinned["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    paths = [str(_ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    pinned["PYTHONPATH"] = os.pathsep.join(paths)
    return pinned


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that a worker ignores, so that it inherits them blocked.

    Else a Ctrl-C, or supervisor's SIGTERM to the group, kills a worker in its first milliseconds.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerProcess:
    """A running worker.

    The thread that starts it must live as long as the worker may: the kernel sends the worker
    SIGKILL when that thread ends (PR_SET_PDEATHSIG).

    Attributes:
        channel: The King's end.
        sentinel: A descriptor that becomes readable when the process ends; None where the kernel
            has no pidfd.
    """

    def __init__(self, spec: WorkerSpec, launch: Launch) -> None:
        ours, theirs = socket.socketpair()
        self.name = spec.name
        self.channel: Channel[Reply] = Channel(ours, to_king)
        passed = [theirs.fileno()] + ([launch.arena] if launch.arena >= 0 else [])
        command = [sys.executable, "-m", "workers", str(theirs.fileno()), str(os.getpid())]
        try:
            with _signals_blocked():
                self._popen = subprocess.Popen(  # noqa: S603 - our own module, no shell
                    command,
                    pass_fds=passed,
                    env=pinned_environment(spec, dict(os.environ)),
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # standard output is the King's
                )
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        self.sentinel = _open_pidfd(self._popen.pid)
        self.channel.send(launch)

    @property
    def pid(self) -> int:
        """Return the process ID."""
        return self._popen.pid

    @property
    def ended(self) -> bool:
        """Tell whether the process has ended; reaps it."""
        return self._popen.poll() is not None

    @property
    def exit_text(self) -> str:
        """Return how it ended, for the log: ``signal SIGKILL`` or ``status 3``."""
        status = self._popen.poll()
        if status is None:
            return "alive"
        if status >= 0:
            return f"status {status}"
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"

    @property
    def exit_status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it lives."""
        return self._popen.poll()

    def kill(self) -> None:
        """SIGKILL; works on a stopped process too."""
        if not self.ended:
            self._popen.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; return False when it has not come in time."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Kill, reap, and close the King's descriptors."""
        self.kill()
        self._popen.wait()
        self.channel.close()
        if self.sentinel is not None:
            os.close(self.sentinel)
            self.sentinel = None


def _open_pidfd(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
