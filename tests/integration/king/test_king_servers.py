"""The King on real servers: RabbitMQ, Redis and the MongoDB protocol, with fake workers."""

import json
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.post import Failure
from config.settings import BrokerSettings, Settings
from king.broker.connect import open_broker, publish_posts
from king.messages import PostMessage
from king.status import read_health
from king.store.client import StoreClient
from king.store.store import Store
from tests.support.fakes.pool import DIED, Answer, default_answer
from tests.support.king.king_rig import Running, fake_pool, king_settings
from tests.support.king.store_rig import mongo_settings
from tests.support.ports import free_port
from tests.support.processes import python
from tests.support.services import MongoServer, RedisServer, wait_until
from workers.protocol import DecodeTask, FetchTask, FuseTask, Task

BROKERS = [
    pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    pytest.param("redis_server", marks=pytest.mark.redis),
]


class Site:
    """One queue and one database, and what lies in them."""

    def __init__(self, folder: Path, broker: BrokerSettings, mongo: MongoServer, name: str) -> None:
        self.folder = folder
        self.settings = king_settings(
            folder, broker=broker, store=mongo_settings(mongo.url, name), lease_s=2
        )
        self.store = Store(StoreClient(self.settings.store))
        self.store.connect()

    def with_king(self, **changes: Any) -> Settings:
        return self.settings.model_copy(
            update={"king": self.settings.king.model_copy(update=changes)}
        )

    def add(self, number: int, *, publish: bool = True) -> list[str]:
        ids = [f"p{i}" for i in range(number)]
        media = {"images": ["http://a/1"], "videos": [{"url": "http://a/2"}]}
        self.store.client.posts.insert_many([{"_id": i, "text": "hello", **media} for i in ids])
        if publish:
            self.publish(ids)
        return ids

    def publish(self, ids: list[str]) -> None:
        publish_posts(self.settings.broker, [PostMessage(i) for i in ids])

    def depth(self) -> int:
        broker = open_broker(self.settings.broker)
        broker.connect()
        with closing(broker):
            return broker.depth()

    @property
    def tagged(self) -> int:
        return int(self.store.queries.counts()["tagged"])

    @contextmanager
    def child(self, *, latency_s: float = 0.0, drain: bool = False, **king: Any) -> Iterator[Any]:
        """A King in a process of its own; killed at the end when it has not ended."""
        content = {
            "settings": self.with_king(**king).model_dump(mode="json"),
            "latency_s": latency_s,
            "drain": drain,
        }
        file = self.folder / "child.json"
        file.write_text(json.dumps(content))
        log = (self.folder / "child.log").open("ab")
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.king.king_child", str(file)],
            stdout=log,
            stderr=log,
        )
        log.close()
        try:
            yield child
        finally:
            child.kill()
            child.wait()

    @property
    def health(self) -> dict[str, Any]:
        """Return what the King last wrote about itself."""
        return read_health(self.settings.king.health_file) or {}

    def told(self, event: str) -> bool:
        return any(line["event"] == event for line in self.log)

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "child.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(params=BROKERS)
def site(
    request: pytest.FixtureRequest,
    mongo_server: MongoServer,
    tmp_path: Path,
    queue_name: str,
    unique_name: str,
) -> Iterator[Site]:
    """A queue of this test alone on each kind of broker."""
    server = request.getfixturevalue(request.param)
    broker = BrokerSettings(url=server.url, queue=queue_name, prefetch=16)
    it = Site(tmp_path, broker, mongo_server, unique_name)
    yield it
    it.store.close()


def test_random_failures_end_tagged_or_dead(site: Site) -> None:
    """Every post is tagged or a dead letter, and no job or message is left.

    Half of the messages are published twice, and two Kings compete for them.
    """
    rng = random.Random(3)

    def answer(task: Task) -> Answer:
        draw = rng.random()
        if draw < 0.06:
            stage = {FetchTask: "fetch", DecodeTask: "decode", FuseTask: "fuse"}.get(type(task))
            return replace(DIED, stage=stage or "extract")
        if draw < 0.10 and isinstance(task, FuseTask):
            return Failure("fuse", "FeatureError", "wrong")
        return default_answer(task)

    site.publish(site.add(60)[::2])
    site.publish(["unknown"])
    pools = [fake_pool(site.folder, answer) for _ in range(2)]
    with Running(site.settings, pools[0], owner="k1", drain=True) as first:
        with Running(site.settings, pools[1], owner="k2", drain=True) as second:
            first.join(120)
            second.join(120)
    assert (first.exit_code, second.exit_code) == (0, 0)
    counts = site.store.queries.counts()
    dead = {job.post_id for job in site.store.queries.dead_letters(limit=1000)}
    assert counts["tagged"] + counts["failed"] == 60
    assert counts["jobs"] == {"running": 0, "waiting": 0, "queued": 0, "dead": len(dead)}
    assert len(dead) == counts["failed"] + 1
    assert site.depth() == 0
    assert all(pool.slots.free == len(pool.slots) for pool in pools)
    assert list((site.folder / "spool").iterdir()) == []


@pytest.mark.parametrize("site", BROKERS[:1], indirect=True)
def test_database_killed_in_the_middle(site: Site, mongo_server: MongoServer) -> None:
    site.add(40)
    pool = fake_pool(site.folder, latency_s=0.02)
    with Running(site.settings, pool) as it:
        it.until(lambda: it.king.status.counter("tagged") >= 5)
        mongo_server.kill()
        it.until(lambda: it.king.status.phase == "store_down")
        mongo_server.start()
        it.until(lambda: site.tagged == 40)
        it.until(lambda: it.king.status.open_jobs is not None and len(it.king.in_flight) == 0)
    assert site.store.queries.counts()["jobs"] == {
        "running": 0,
        "waiting": 0,
        "queued": 0,
        "dead": 0,
    }
    assert site.depth() == 0


@pytest.mark.parametrize("site", BROKERS[1:], indirect=True)  # the quick one to restart
def test_broker_restarted_in_the_middle(site: Site, redis_server: RedisServer) -> None:
    site.add(40)
    with Running(site.settings, fake_pool(site.folder, latency_s=0.02)) as it:
        it.until(lambda: it.king.status.counter("tagged") >= 5)
        redis_server.kill()
        it.until(lambda: it.king.status.phase == "broker_down")
        redis_server.start()
        it.until(lambda: site.tagged == 40 and it.king.status.phase == "serving")
        it.until(lambda: len(it.king.in_flight) == 0)
    assert site.depth() == 0
    assert site.store.queries.counts()["jobs"]["running"] == 0


@pytest.mark.parametrize("site", BROKERS[1:], indirect=True)
def test_sigterm_drains_and_puts_the_rest_back(site: Site) -> None:
    """SIGTERM: what is in flight is finished or put back without costing an attempt, exit 0."""
    site.add(100)
    with site.child(latency_s=0.1, drain_timeout_s=1.0) as child:
        wait_until(lambda: site.tagged >= 1, 60, "the first post")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    tagged = site.tagged
    assert 1 <= tagged < 100
    counts = site.store.queries.counts()
    assert counts["jobs"] == {"running": 0, "waiting": 0, "queued": 0, "dead": 0}
    assert site.depth() == 100 - tagged
    with site.child(drain=True) as child:
        assert child.wait(120) == 0
    assert site.tagged == 100
    assert all(p["insight"]["attempts"] == 1 for p in site.store.client.posts.find())


def test_killed_king_is_succeeded_at_once(site: Site) -> None:
    """SIGKILL: the next King sees that its predecessor is dead and waits for no lease.

    On Redis nobody tells of the death: the successor republishes what the dead one had begun.
    """
    site.add(12)
    with site.child(latency_s=90, lease_s=600) as child:
        wait_until(lambda: site.store.queries.counts()["jobs"]["running"] == 12, 60, "all to run")
        child.kill()
    with site.child(lease_s=600, attempts=3):
        wait_until(lambda: site.tagged == 12, 60, "the successor")
    assert {p["insight"]["attempts"] for p in site.store.client.posts.find()} == {2}


def test_a_king_without_descriptors_goes_on(site: Site) -> None:
    """It opens nothing for its first posts, not even a module of Python; the servers are known."""
    with site.child() as child:
        wait_until(lambda: site.health.get("phase") == "serving", 60, "a King that serves")
        limits = resource.prlimit(child.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        wait_until(lambda: site.told("king.health_file_failed"), 60, "the want of descriptors")
        ids = ["p0", "p1"]
        site.store.client.posts.insert_many([{"_id": i, "text": "hello"} for i in ids])
        site.publish(ids)
        wait_until(lambda: site.tagged == 2 or child.poll() is not None, 60, "the posts")
        resource.prlimit(child.pid, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: site.health.get("posts_tagged") == 2, 60, "its health file")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


@pytest.mark.parametrize("site", BROKERS[:1], indirect=True)
def test_king_process_is_small_and_free_of_models(site: Site) -> None:
    """The King with its metrics loads neither torch nor cv2, and stays far under 150 MB."""
    site.add(100)
    probe = (
        "import sys; from tests.support.king import king_child; "
        "code = king_child.main(sys.argv[1]); "
        "import psutil; heavy = [m for m in ('torch', 'cv2', 'av', 'transformers', 'timm', "
        "'onnxruntime', 'fusion') if m in sys.modules]; "
        "print(code, round(psutil.Process().memory_info().rss / 2**20), *heavy)"
    )
    settings = site.with_king(metrics=f"127.0.0.1:{free_port()}").model_dump(mode="json")
    file = site.folder / "child.json"
    file.write_text(json.dumps({"settings": settings, "latency_s": 0, "drain": True}))
    done = python("-c", probe, str(file), timeout_s=60)
    code, rss_mb, *heavy = done.stdout.split()
    assert (code, heavy) == ("0", []), done.stderr[-2000:]
    assert int(rss_mb) < 150
    print(f"resident memory of the King: {rss_mb} MB")  # noqa: T201 - shown with pytest -s
    assert site.tagged == 100
