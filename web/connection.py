"""Whether anybody still waits at the other end."""

from __future__ import annotations

import select
import socket
from typing import Any


def client_is_gone(environ: dict[str, Any]) -> bool:
    """Whether the client has closed its connection; False where that cannot be seen."""
    connection = environ.get("gunicorn.socket")
    if not isinstance(connection, socket.socket):
        return False
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        # Bytes of a next request are no farewell; the end of the stream is.
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True
