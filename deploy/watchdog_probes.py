"""What the watchdog asks for itself, each time on a connection of its own and with time-outs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from common.errors import TaggingError
from config.settings import Settings
from deploy import embedded
from king.broker.broker import queue_depth
from king.store.client import MongoEdge

_DOWN = "the embedded service is not running"


@dataclass(frozen=True)
class Depth:
    """Messages that wait, or why that is not known."""

    messages: int | None
    error: str | None = None


class Probes(Protocol):
    """The questions."""

    def broker(self) -> Depth:
        """Reach the broker and ask how many messages wait."""
        ...

    def store(self) -> str | None:
        """Why the database does not answer; None when it does."""
        ...

    def health_file(self) -> str | None:
        """Why nobody can write a health file now; None when one can."""
        ...


class RealProbes:
    """The questions to the real broker, database and disk."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def broker(self) -> Depth:
        """See `Probes.broker`."""
        settings = embedded.peek(self._settings).broker
        if settings.url.startswith(embedded.SCHEME):
            return Depth(None, _DOWN)
        limit_s = min(settings.socket_timeout_s, self._settings.watchdog.probe_timeout_s)
        try:
            return Depth(queue_depth(settings.model_copy(update={"socket_timeout_s": limit_s})))
        except TaggingError as error:
            return Depth(None, str(error))

    def store(self) -> str | None:
        """See `Probes.store`."""
        settings = embedded.peek(self._settings).store
        if settings.url.startswith(embedded.SCHEME):
            return _DOWN
        limit_s = min(settings.timeout_s, self._settings.watchdog.probe_timeout_s)
        edge = _Pinged(settings.model_copy(update={"timeout_s": limit_s}))
        try:
            edge.ping()
        except TaggingError as error:
            return str(error)
        finally:
            edge.close()
        return None

    def health_file(self) -> str | None:
        """See `Probes.health_file`."""
        file = self._settings.king.health_file
        scratch = file.with_name(f".{file.name}.watchdog")
        try:
            scratch.write_text(f"{os.getpid()}\n")
            scratch.unlink()
        except OSError as error:
            return f"{file.parent} cannot be written: {error.strerror or error}"
        return None


class _Pinged(MongoEdge):
    def ping(self) -> None:
        with self.edge():
            self._database.command("ping")
