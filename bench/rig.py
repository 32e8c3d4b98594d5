"""The rig of the benches of the daemon: servers, Kings, posts, and the CPU of every process.

Everything is on loopback and in one folder: RabbitMQ or Redis with nx-27017, or the embedded
services; one King or several as plain children; a media server in a process of its own. A load is
published at once, and its clock runs from there to the last post's ``tagged_at``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import yaml
from chaos_rig.site import SERVERS

from config.settings import EmbeddedSettings, Settings
from demo.online import alive, daemon
from deploy import embedded
from king.broker.connect import open_broker, publish_posts
from king.messages import PostMessage
from king.status import read_health
from king.store.client import StoreClient
from tests.support.services import MongoServer

ROOT = Path(__file__).resolve().parents[1]
BrokerName = Literal["rabbitmq", "redis", "embedded"]
BROKERS: tuple[BrokerName, ...] = get_args(BrokerName)
STALL_S = 180.0
"""Without a tagged post for so long a load has failed: the slowest post of a bench takes seconds,
on a machine with other work ten times as long."""
SERVER_NAMES = ("broker", "database")
_POLL_S = 0.05
_TITLE = "insighttag: "
_URLS = {"rabbitmq": "amqp://guest:guest@127.0.0.1:{}//", "redis": "redis://127.0.0.1:{}/0"}


@dataclass(frozen=True)
class Load:
    """Posts that went through, and what they cost.

    Attributes:
        posts_per_s: From publishing the first to tagging the last.
        cpu_ms: CPU of a post by process: ``king``, the roles of its workers, ``broker``,
            ``database``.
    """

    posts_per_s: float
    cpu_ms: Mapping[str, float]


class Site:
    """A broker and a database that run, and the Kings between them.

    Attributes:
        settings: With the URLs of the servers.
        folder: Of configuration, logs and health files.
    """

    def __init__(self, settings: Settings, folder: Path, servers: Mapping[str, int]) -> None:
        """Describe it; `site` starts the servers, `kings` the daemon.

        Args:
            settings: With the URLs of the servers.
            folder: For configuration, logs and health files.
            servers: Process IDs.
        """
        self.settings = settings
        self.folder = folder
        self._servers = servers
        self._kings: list[tuple[Any, Path, Path]] = []
        self._client = StoreClient(settings.store)

    @contextmanager
    def kings(self, count: int = 1, tree: Path = ROOT) -> Iterator[None]:
        """Run that many daemons of a checkout until the block ends; they serve when it begins.

        Those of a block around this one count.
        """
        before = len(self._kings)
        was, os.environ["PYTHONPATH"] = Path.cwd(), str(tree)
        os.chdir(tree)  # `daemon` starts the script of its folder
        with ExitStack() as stack:
            stack.callback(lambda: self._kings.__delitem__(slice(before, None)))
            stack.callback(os.chdir, was)
            for number in range(before, count):
                health = self.folder / f"king-{number}.json"
                king = self.settings.king.model_copy(update={"health_file": health})
                own = self.settings.model_copy(update={"king": king})
                config = self.folder / f"king-{number}.yaml"
                config.write_text(yaml.safe_dump(own.model_dump(mode="json")), encoding="utf-8")
                log = self.folder / f"king-{number}.log"
                child = stack.enter_context(daemon(["--config", str(config)], own, log))
                self._kings.append((child, health, log))
            yield

    def insert(self, documents: Sequence[Mapping[str, Any]]) -> list[str]:
        """Put posts into the database; gives their IDs."""
        for i in range(0, len(documents), 1000):
            self._client.posts.insert_many([dict(each) for each in documents[i : i + 1000]])
        return [str(each["_id"]) for each in documents]

    @contextmanager
    def publisher(self) -> Iterator[Callable[[Sequence[str], int], float]]:
        """Give `publish` with one connection; one for each post takes 8 ms of CPU on RabbitMQ."""
        broker = open_broker(self.settings.broker)
        broker.connect()

        def publish(ids: Sequence[str], priority: int) -> float:
            sent_at = time.time()
            broker.publish([PostMessage(each, priority) for each in ids])
            return sent_at

        try:
            yield publish
        finally:
            broker.close()

    def publish(self, ids: Sequence[str], priority: int = 0) -> float:
        """Put IDs on the Kings' queue; gives the time at which they were sent."""
        with self.publisher() as publish:
            return publish(ids, priority)

    def results(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the results of those that have one."""
        path = self.settings.store.result_path
        posts = self._client.posts.find({"_id": {"$in": list(ids)}})
        return {str(post["_id"]): post[path] for post in posts if post.get(path)}

    def tagged(self, ids: Sequence[str]) -> int:
        """Count those that have a result."""
        result = {f"{self.settings.store.result_path}.status": {"$exists": True}}
        return int(self._client.posts.count_documents({"_id": {"$in": list(ids)}, **result}))

    @property
    def pids(self) -> list[int]:
        """Return the Kings."""
        return [child.pid for child, _, _ in self._kings]

    @property
    def ended(self) -> int:
        """Return the posts that the Kings have tagged or given up, by their health files."""
        counters = [(read_health(health) or {}).get("counters", {}) for _, health, _ in self._kings]
        return sum(each.get("tagged", 0) + each.get("dead", 0) for each in counters)

    def wait_for(self, ended: int) -> None:
        """Wait until a number of posts have ended since the Kings' start.

        Raises:
            TaggingError: A King has died.
            TimeoutError: None has ended for long.
        """
        seen, latest = -1, time.monotonic()
        while (now := self.ended) < ended:
            if now > seen:
                seen, latest = now, time.monotonic()
            if time.monotonic() - latest > STALL_S:
                raise TimeoutError(f"{ended - now} posts have not ended; see {self.folder}")
            for child, _, log in self._kings:
                alive(child, log)
            time.sleep(_POLL_S)

    def load(self, documents: Sequence[Mapping[str, Any]]) -> Load:
        """Insert posts, publish them, and wait until all are tagged.

        Raises:
            RuntimeError: A post was not tagged.
        """
        ids, before = self.insert(documents), self.ended
        used, began = self.cpu_s(), time.time()
        self.publish(ids)
        self.wait_for(before + len(ids))
        used = {name: s - used.get(name, 0.0) for name, s in self.cpu_s().items()}
        results = self.results(ids)
        tagged = [each for each in results.values() if each["status"] == "tagged"]
        if len(tagged) < len(ids):
            raise RuntimeError(f"{len(tagged)} of {len(ids)} posts are tagged; see {self.folder}")
        seconds = max(each["tagged_at"].timestamp() for each in tagged) - began
        cpu_ms = {name: round(1000 * s / len(ids), 3) for name, s in used.items()}
        return Load(len(ids) / seconds, cpu_ms)

    def bare(self, documents: Sequence[Mapping[str, Any]], batch: int, loops: int = 1) -> Load:
        """Insert posts and have bare loops settle them, `batch` at once: `bench/peers/bare.py`."""
        ids, store = self.insert(documents), self.settings.store
        broker = self.settings.broker.model_copy(update={"queue": f"bare-{batch}-{loops}"})
        publish_posts(broker, [PostMessage(post_id) for post_id in ids])
        url = broker.url.replace("unix://", "redis+socket://").replace("?db=0", "?virtual_host=0")
        script = str(ROOT / "bench" / "peers" / "bare.py")
        command = [sys.executable, script, url, store.url, store.database, broker.queue, str(batch)]
        used = self.cpu_s()
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(loops)
        ]
        said = [json.loads(child.communicate(timeout=600)[0]) for child in children]
        said = [each for each in said if each["settled"]]  # another may have been quicker
        if (settled := sum(each["settled"] for each in said)) != len(ids):
            raise RuntimeError(f"bare loops have settled {settled} of {len(ids)} posts")
        spent = {name: self.cpu_s()[name] - used[name] for name in SERVER_NAMES}
        spent["loop"] = sum(each["cpu_s"] for each in said)
        seconds = max(each["ended_at"] for each in said) - min(each["began_at"] for each in said)
        return Load(len(ids) / seconds, {name: 1000 * s / len(ids) for name, s in spent.items()})

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds until now by process; Kings and workers of a role together."""
        seconds = defaultdict[str, float](float)
        for child, _, _ in self._kings:
            for process in tree_of(child.pid):
                seconds[_name(process)] += cpu_s(process)
        for name, pid in self._servers.items():
            seconds[name] += sum(map(cpu_s, tree_of(pid)))
        return dict(seconds)

    def idle_percent(self, seconds: float) -> dict[str, float]:
        """Return the share of a core by process while nothing is to be done."""
        used = self.cpu_s()
        time.sleep(seconds)
        return {
            name: round(100 * (s - used.get(name, 0.0)) / seconds, 2)
            for name, s in self.cpu_s().items()
        }

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


@contextmanager
def site(broker: BrokerName, settings: Settings, folder: Path) -> Iterator[Site]:
    """Start a broker and a database; they end with the block.

    Args:
        broker: ``embedded`` brings its own database; the others have nx-27017 on TCP.
        settings: The URLs are filled in.
        folder: An empty one with a short path: it will hold unix sockets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if broker == "embedded":
            inner = EmbeddedSettings(folder=folder / "embedded")
            asked = settings.model_copy(update={"embedded": inner})
            stack.callback(embedded.stop, asked)
            resolved = embedded.resolve(asked)
            pids = {view.name: view.pid for view in embedded.status(asked)}
            servers = {"broker": pids["redis"], "database": pids["mongo"]}
        else:
            server, database = SERVERS[broker](folder / broker), MongoServer(folder / "mongo")
            for each in (server, database):
                stack.callback(each.close)
                each.start()
            url = _URLS[broker].format(server.port)
            sections = {
                "broker": settings.broker.model_copy(update={"url": url}),
                "store": settings.store.model_copy(update={"url": database.url}),
            }
            resolved = settings.model_copy(update=sections)
            servers = {"broker": server.pid, "database": database.pid}
        made = Site(resolved, folder, {name: pid or 0 for name, pid in servers.items()})
        stack.callback(made.close)
        yield made


def _name(process: psutil.Process) -> str:
    """Return the role of a worker by its title, ``ocr`` where it does nothing else; or ``king``."""
    with suppress(psutil.Error):
        match " ".join(process.cmdline()).partition(_TITLE)[2].split():
            case ["extract", _, "ocr"]:
                return "ocr"
            case [role, *_]:
                return role
    return "king"


def tree_of(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants that live."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds of a process, 0 of one that has ended."""
    with suppress(psutil.Error):
        return float(sum(process.cpu_times()[:2]))
    return 0.0


def median_load(loads: Sequence[Load]) -> dict[str, Any]:
    """Return the figures of the rounds of one case, as they are written."""
    names = sorted({name for load in loads for name in load.cpu_ms})
    return {
        "posts_per_s": round(statistics.median(load.posts_per_s for load in loads), 2),
        "posts_per_s_rounds": [round(load.posts_per_s, 2) for load in loads],
        "cpu_ms": {
            name: round(statistics.median(load.cpu_ms.get(name, 0.0) for load in loads), 3)
            for name in names
        },
    }
