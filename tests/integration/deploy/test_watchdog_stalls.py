"""A stalled King under the real supervisord: the real King and watchdog, real Redis and database.

The limit to hold: a stall is over, and the King serves, within ``watchdog.stall_s`` + 15 s.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest

from king.broker.connect import publish_posts
from tests.support.deploy.checkout import Checkout, eventually
from tests.support.services import MongoServer, RedisServer

pytestmark = pytest.mark.slow

STALL_S = 4.0  # over what a call to a hanging database takes: its time-out twice, and a look for it
LIMIT_S = STALL_S + 15

KING = "import sys\nfrom tests.support.deploy.stalling_king import main\nsys.exit(main())\n"

SETTINGS = """
broker: {{url: "{redis}", queue: "{name}.posts", socket_timeout_s: 1, visibility_timeout_s: 4}}
store:
  url: "{mongo}"
  database: {name}
  timeout_s: 1
king: {{drain_timeout_s: 2, lease_s: 3}}
watchdog: {{stall_s: {stall_s}, interval_s: 0.3, start_timeout_s: 30, probe_timeout_s: 1}}
embedded: {{folder: workshop/embedded}}
fetch: {{spool: workshop/spool}}
log: {{format: json}}
"""


class Rig(Checkout):
    """A checkout with posts to publish."""

    def __init__(self, folder: Path, name: str, redis: RedisServer, mongo: MongoServer) -> None:
        settings = SETTINGS.format(name=name, redis=redis.url, mongo=mongo.url, stall_s=STALL_S)
        super().__init__(folder, KING, settings)
        self._mongo_url = mongo.url
        self._name = name

    @property
    def pid(self) -> int:
        return self.client.program().pid

    def begin(self) -> int:
        """Start everything; gives the King's pid once it has tagged a post."""
        self.start()
        assert eventually(self.serving), self.logs()
        self.publish("before")
        assert eventually(lambda: self.tagged("before")), self.logs()
        return self.pid

    def publish(self, post_id: str) -> None:
        from config.load import load_settings
        from king.messages import PostMessage

        with self._client() as client:
            client[self._name]["posts"].insert_one({"_id": post_id, "text": "words"})
        publish_posts(load_settings(self.folder / "settings.yaml").broker, [PostMessage(post_id)])

    def tagged(self, post_id: str) -> bool:
        with self._client() as client:
            post = client[self._name]["posts"].find_one({"_id": post_id}) or {}
        return bool((post.get("insight") or {}).get("status") == "tagged")

    def trouble(self, word: str) -> None:
        part = self.folder / "trouble.part"
        part.write_text(word)
        part.rename(self.folder / "trouble")
        assert eventually(lambda: not (self.folder / "trouble").exists())

    def restarts(self) -> int:
        return self.watchdog_log().count('"action": "restart"')

    def stacks(self) -> str:
        """Return the stack files of stalled Kings."""
        return (self.run / "king.stacks").read_text()

    def _client(self) -> pymongo.MongoClient[dict[str, Any]]:
        return pymongo.MongoClient(self._mongo_url, serverSelectionTimeoutMS=3000)


@pytest.fixture
def rig(
    short_path: Path, unique_name: str, redis_server: RedisServer, mongo_server: MongoServer
) -> Iterator[Rig]:
    made = Rig(short_path, unique_name, redis_server, mongo_server)
    try:
        yield made
    finally:
        made.stop()


def over(rig: Rig, stalled: int, began: float) -> None:
    """The stall ends in time: another King serves, and tags a post."""
    assert eventually(lambda: rig.serving(stalled), LIMIT_S - (time.monotonic() - began)), (
        rig.logs()
    )
    assert not psutil.pid_exists(stalled)
    assert rig.restarts() == 1
    if not rig.tagged("after"):
        assert eventually(lambda: rig.tagged("after")), rig.logs()


def stop_process(rig: Rig, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    rig.publish("after")


def block_loop(rig: Rig, _pid: int) -> None:
    rig.trouble("block")
    rig.publish("after")


def lose_subscription(rig: Rig, _pid: int) -> None:
    rig.trouble("lose!")
    rig.publish("after")


@pytest.mark.parametrize(
    ("stall", "reason", "shown"),
    [
        # A stopped process cannot write its own stacks: its state is written.
        (stop_process, "main thread last moved", "(stopped)"),
        (block_loop, "broker thread last moved", "stalling_king.py"),
        (lose_subscription, "idle for", "king/king.py"),
    ],
)
def test_a_stalled_king_is_replaced_in_time(
    rig: Rig, stall: Callable[[Rig, int], None], reason: str, shown: str
) -> None:
    """SIGSTOP, a blocked draining loop, a subscription that stays lost: each ends within the limit.

    The log names the reason once, and the stacks tell where it hung.
    """
    pid = rig.begin()
    began = time.monotonic()
    stall(rig, pid)
    over(rig, pid, began)
    assert reason in rig.watchdog_log()
    assert f"pid {pid}" in rig.stacks()
    assert shown in rig.stacks()


def test_a_lost_subscription_is_cured_without_a_restart(rig: Rig) -> None:
    """The King is first asked to connect anew; that helps, so it is not killed."""
    pid = rig.begin()
    rig.trouble("lose")
    rig.publish("after")
    assert eventually(lambda: rig.tagged("after"), LIMIT_S), rig.logs()
    assert rig.pid == pid
    assert rig.restarts() == 0
    assert rig.watchdog_log().count('"action": "nudge"') == 1


def untouched(rig: Rig, pid: int) -> None:
    """Twice the patience passes, and the watchdog does nothing to the King."""
    time.sleep(2.2 * STALL_S)
    assert rig.pid == pid
    assert rig.restarts() == 0
    assert '"action": "nudge"' not in rig.watchdog_log()


def test_a_king_without_work_or_database_is_left_alone(rig: Rig, mongo_server: MongoServer) -> None:
    """An empty queue is no stall, nor is work that waits for a database that is down."""
    pid = rig.begin()
    untouched(rig, pid)
    rig.publish("after")
    mongo_server.kill()
    untouched(rig, pid)
    mongo_server.start()
    assert eventually(lambda: rig.serving() and rig.tagged("after")), rig.logs()
    assert rig.pid == pid
    assert rig.restarts() == 0


def test_a_king_whose_servers_do_not_answer_is_left_alone(
    rig: Rig, mongo_server: MongoServer, redis_server: RedisServer
) -> None:
    """The same where database or broker only hang, so that the King waits inside a call."""
    pid = rig.begin()
    for server in (mongo_server, redis_server):
        server.pause()
        untouched(rig, pid)
        server.resume()
        assert eventually(rig.serving), rig.logs()
    rig.publish("after")
    assert eventually(lambda: rig.tagged("after")), rig.logs()
    assert rig.pid == pid
    assert rig.restarts() == 0
