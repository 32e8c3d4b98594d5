"""The name of a King process, by which other Kings can tell whether it is still alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil


def own_name() -> str:
    """Return ``host:namespace:pid:started``, unique to this process and testable on its host."""
    return f"{_host()}:{_namespace()}:{os.getpid()}:{_started(psutil.Process())}"


def is_dead(owner: str) -> bool:
    """Return True if the named King certainly is dead: it ran on this host and is gone.

    False when that cannot be known, for example on another host; its lease decides then.
    """
    parts = owner.split(":")
    if len(parts) != 4 or parts[:2] != [_host(), _namespace()] or not parts[2].isdigit():
        return False
    try:
        process = psutil.Process(int(parts[2]))
        return process.status() == psutil.STATUS_ZOMBIE or _started(process) != parts[3]
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _started(process: psutil.Process) -> str:
    return str(round(process.create_time() * 1000))


def _host() -> str:
    return socket.gethostname().replace(":", "-").replace(" ", "-")


def _namespace() -> str:
    # Containers may share a host's name, and process IDs mean the same only within one namespace.
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "-"
