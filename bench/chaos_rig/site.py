"""A whole installation on loopback: servers, proxies before them, supervisord, the daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xmlrpc.client
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from chaos_rig import clock
from chaos_rig.audit import Audit
from chaos_rig.journal import Journal
from config.settings import Settings
from king.broker.connect import publish_posts, queue_counts, queue_depth
from king.broker.rabbitmq import dead_queue
from king.messages import PostMessage
from king.status import read_health
from king.store.client import StoreClient
from king.store.store import Store
from tests.support.mongo_proxy import MongoProxy
from tests.support.proxy import Proxy
from tests.support.services import (
    DIE_WITH_PARENT,
    MongoServer,
    RabbitMQServer,
    RedisServer,
    Server,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
BrokerName = Literal["rabbitmq", "redis"]
SERVERS: dict[BrokerName, type[RabbitMQServer] | type[RedisServer]] = {
    "rabbitmq": RabbitMQServer,
    "redis": RedisServer,
}
LEADER_S = 2.0
"""RabbitMQ 3.10: a quorum queue killed right after its declaration stays without a leader."""


class Site:
    """One folder with everything in it; nothing outlives `close`.

    Attributes:
        direct: The settings as the daemon has them, past the proxies.
        journal: What the daemon logs.
        audit: What is written to the posts.
        clock: The clock of the daemon's processes.
        poison: Keys of the dead letters that unreadable messages must have become.
    """

    def __init__(self, folder: Path, broker: BrokerName, settings: dict[str, Any]) -> None:
        """Describe it; `open` starts it.

        Args:
            folder: An empty folder with a short path (it will hold a unix socket).
            broker: Which.
            settings: Sections of `Settings`; URLs and paths are filled in here.
        """
        self.folder = folder
        self.run_folder = folder / "workshop" / "run"
        self.broker: Server = SERVERS[broker](folder / broker)
        self.database = MongoServer(folder / "mongo")
        self.broker_proxy = Proxy(self.broker.address)
        self.database_proxy = MongoProxy(self.database.address)
        self._scheme = "redis://127.0.0.1:{}/0"
        if broker == "rabbitmq":
            self._scheme = "amqp://guest:guest@127.0.0.1:{}//"
        self._sections = settings
        self.direct = self._settings(self.broker.port, self.database.port)
        self.through = self._settings(self.broker_proxy.port, self.database_proxy.port)
        patient = self.direct.store.model_copy(update={"timeout_s": 60})  # not what is measured
        self.store = Store(StoreClient(patient))
        self.journal = Journal(self.run_folder / "king.log")
        self.audit = Audit(self.database.folder / "data" / f"{self.direct.store.database}.db")
        self.clock = clock.Clock(folder / "clock")
        self.poison: set[str] = set()
        self._supervisord: subprocess.Popen[bytes] | None = None

    def _settings(self, broker_port: int, database_port: int) -> Settings:
        sections = {name: dict(section) for name, section in self._sections.items()}
        sections.setdefault("broker", {})["url"] = self._scheme.format(broker_port)
        sections.setdefault("store", {})["url"] = f"mongodb://127.0.0.1:{database_port}/"
        sections.setdefault("fetch", {})["spool"] = str(self.folder / "spool")
        sections.setdefault("king", {})["health_file"] = str(self.run_folder / "king.json")
        sections["log"] = {"format": "json"}
        return Settings.model_validate(sections)

    def open(self, posts: list[dict[str, Any]]) -> None:
        """Start the servers, put the posts in, declare the queue."""
        self.run_folder.mkdir(parents=True)
        self.broker.start()
        self.database.start()
        self.store.connect()
        for i in range(0, len(posts), 1000):
            self.store.client.posts.insert_many(posts[i : i + 1000])
        self.audit.install(self.direct.store.collection, self.direct.store.result_path)
        publish_posts(self.direct.broker, [])
        time.sleep(LEADER_S if isinstance(self.broker, RabbitMQServer) else 0)
        self.journal.start()

    def start_daemon(self) -> None:
        """Start supervisord with the shipped configuration: the King and its watchdog."""
        (self.folder / "deploy").mkdir()
        conf = self.folder / "deploy" / "supervisord.conf"
        shipped = (ROOT / "deploy" / "supervisord.conf").read_text()
        # Without the monitor, whose script this folder does not have: it would only be restarted.
        conf.write_text(shipped[: shipped.index("[program:mongo_supervisor]")])
        (self.folder / "online_process.py").symlink_to(ROOT / "online_process.py")
        content = self.through.model_dump(mode="json")
        (self.folder / "settings.yaml").write_text(yaml.safe_dump(content))
        start = self.folder / "start"
        start.mkdir()
        (start / "sitecustomize.py").write_text("from chaos_rig.clock import follow\n\nfollow()\n")
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(start), str(ROOT), str(ROOT / "bench"))),
            clock.VARIABLE: str(self.folder / "clock"),
            "PYTHONWARNINGS": "ignore",
            "KING_ARGS": "--config settings.yaml",
        }
        with (self.folder / "supervisord.out").open("wb") as out:
            self._supervisord = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-c", DIE_WITH_PARENT),
                    *(sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(conf)),
                ],
                cwd=self.folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_for_phase(self, phase: str, timeout_s: float) -> None:
        """Wait until the running King says so."""
        wait_until(
            lambda: self.health.get("phase") == phase and self.king_pid is not None,
            timeout_s,
            f"the King to be {phase}",
        )

    def close(self) -> None:
        """End the daemon and the servers, however they are."""
        process, self._supervisord = self._supervisord, None
        if process is not None and process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(self.direct.king.drain_timeout_s + 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in psutil.wait_procs(children, 5)[1]:
                child.kill()
        if self.journal.is_alive():
            self.journal.stop()
        self.store.close()
        for server in (self.broker, self.database):
            server.resume()
            server.close()
        self.broker_proxy.close()
        self.database_proxy.close()

    @property
    def health(self) -> dict[str, Any]:
        """Return the King's health file; empty when there is none."""
        return read_health(self.direct.king.health_file) or {}

    @property
    def king_pid(self) -> int | None:
        """Return the King that lives now and has written its health file."""
        pid = self.health.get("pid")
        try:
            alive = psutil.Process(int(pid or 0)).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return int(pid) if pid and alive else None

    def worker(self, role: str, wait_s: float = 60) -> tuple[str, int]:
        """Name and process of a ready worker of that role."""
        ready: list[tuple[str, int]] = []

        def look() -> bool:
            ready[:] = [
                (str(view["name"]), int(view["pid"]))
                for view in self.health.get("workers", [])
                if view["role"] == role and view["state"] == "ready" and view["pid"]
            ]
            return bool(ready) and self.king_pid is not None and psutil.pid_exists(ready[0][1])

        wait_until(look, wait_s, f"a ready {role} worker")
        return ready[0]

    def kill_king(self) -> None:
        """Send SIGKILL; supervisord starts the next King."""
        pid = self.king_pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def stop_king(self) -> tuple[int, float]:
        """Send SIGTERM through supervisord; return the exit status, and seconds until the end."""
        began = time.monotonic()
        self._supervisor("stopProcess", "king", False)
        wait_until(
            lambda: self._supervisor("getProcessInfo", "king")["statename"] == "STOPPED",
            self.direct.king.drain_timeout_s + 60,
            "the King to stop",
        )
        seconds = time.monotonic() - began
        return int(self._supervisor("getProcessInfo", "king")["exitstatus"]), seconds

    def start_king(self) -> None:
        """Have supervisord start it again."""
        self._supervisor("startProcess", "king", False)

    def _supervisor(self, method: str, *arguments: Any) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self.run_folder}/supervisor.sock")
        with xmlrpc.client.ServerProxy("http://127.0.0.1", transport) as server:
            return getattr(server.supervisor, method)(*arguments)

    def publish(self, ids: list[str]) -> None:
        """Publish past the proxies, with confirms."""
        publish_posts(self.direct.broker, [PostMessage(post_id) for post_id in ids])

    @property
    def messages_left(self) -> int:
        """Return messages on the queue or in somebody's hands, where the latter are known."""
        waiting, unacknowledged = queue_counts(self.direct.broker)
        return waiting + (unacknowledged or 0)

    @property
    def messages_given_up(self) -> int:
        """Return messages that RabbitMQ itself has dead-lettered."""
        if isinstance(self.broker, RedisServer):
            return 0
        return queue_depth(self.direct.broker, dead_queue(self.direct.broker.queue))

    @property
    def king_exit_2(self) -> int:
        """Return how often a King ended with exit code 2, after which nobody starts the next."""
        log = (self.run_folder / "supervisord.log").read_text(errors="replace")
        return log.count(": king (exit status 2")

    def ends(self) -> dict[str, str]:
        """Return ``tagged`` or ``dead`` for each post that has come to an end."""
        path = f"{self.direct.store.result_path}.status"
        tagged = self.store.client.posts.find({path: "tagged"}, {"_id": 1})
        ends = {str(post["_id"]): "tagged" for post in tagged}
        ends |= {job.post_id: "dead" for job in self.store.queries.dead_letters(limit=100_000)}
        return ends

    def open_jobs(self) -> int:
        """Return jobs that are no dead letters."""
        return sum(n for state, n in self.store.queries.counts()["jobs"].items() if state != "dead")
