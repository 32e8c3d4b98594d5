"""Settings of the HTTP server."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from config.base import PositiveInt, Seconds, Section

MIB = 1024 * 1024
HostName = Annotated[str, Field(pattern=r"^[^\s/:]+$")]


class HttpSettings(Section):
    """`flask_server.py`: where it listens, and what one request may ask for.

    Uploads lie in a folder of their own under ``fetch.spool`` while their post is being tagged.
    """

    host: str = "127.0.0.1"
    """There is no log-in: let others in only through a proxy that asks for one."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Names without port that requests may be addressed to, as a proxy's; besides `host`,
    ``localhost`` and IP addresses. Others are refused: a foreign site could point its own here."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    threads: PositiveInt = 32
    """Requests that are served at once; above `posts`, so that health is answered while busy."""
    posts: PositiveInt = 16
    """Posts that are being tagged at once; more wait for `queue_s`, and are then refused."""
    queue_s: Annotated[float, Field(ge=0)] = 5
    retry_after_s: PositiveInt = 5
    """Value of Retry-After for a refused client."""
    deadline_s: Seconds = 120
    """One post may take this long."""
    body_timeout_s: Seconds = 120
    """A request's body must have arrived within this time."""
    max_body_bytes: PositiveInt = 256 * MIB
    max_json_bytes: PositiveInt = MIB
    max_files: PositiveInt = 20
    """Files and URLs of one post together."""
    max_text_chars: PositiveInt = 20_000
    shutdown_timeout_s: Seconds = 30
    """Requests in flight may take this long to finish on SIGTERM."""
    probe_timeout_s: Seconds = 2
    """`/readyz` asks the broker and the database for at most this long."""
