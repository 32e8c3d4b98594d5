"""gunicorn's own messages as events of our log."""

from __future__ import annotations

from typing import Any

import structlog
from gunicorn.glogging import Logger

_log = structlog.get_logger()


class GunicornLog(Logger):  # type: ignore[misc]
    """A gunicorn logger that writes to structlog; requests are logged by `web.guard`."""

    def setup(self, cfg: Any) -> None:
        """No handlers of its own."""
        self.cfg = cfg

    def critical(self, msg: Any, *args: Any, **_: Any) -> None:
        """A worker hangs."""
        _log.error("http.server", text=_text(msg, args))

    def error(self, msg: Any, *args: Any, **_: Any) -> None:
        """As it says."""
        _log.error("http.server", text=_text(msg, args))

    def warning(self, msg: Any, *args: Any, **_: Any) -> None:
        """As it says."""
        _log.warning("http.server", text=_text(msg, args))

    def info(self, msg: Any, *args: Any, **_: Any) -> None:
        """Starts and ends."""
        _log.info("http.server", text=_text(msg, args))

    def debug(self, msg: Any, *args: Any, **_: Any) -> None:
        """Connections."""
        _log.debug("http.server", text=_text(msg, args))

    def exception(self, msg: Any, *args: Any, **_: Any) -> None:
        """As it says, with where."""
        _log.exception("http.server", text=_text(msg, args))

    def log(self, lvl: Any, msg: Any, *args: Any, **_: Any) -> None:
        """Any level."""
        del lvl
        _log.info("http.server", text=_text(msg, args))

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        """Said by the application, with what it knows."""

    def reopen_files(self) -> None:
        """There are none."""

    def close_on_exec(self) -> None:
        """There are none."""


def _text(message: Any, args: tuple[Any, ...]) -> str:
    try:
        return " ".join((str(message) % args if args else str(message)).split())[:500]
    except (TypeError, ValueError):
        return str(message)[:500]
