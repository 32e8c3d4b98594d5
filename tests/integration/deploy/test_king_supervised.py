"""Faults that pass, met by the daemon under the shipped supervisord: it goes on by itself.

Only a daemon that refuses its configuration ends with 2, and only that is not started again.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pymongo
import pytest

from config.load import load_settings
from king.broker.connect import publish_posts
from king.messages import PostMessage
from tests.support.deploy.checkout import Checkout, eventually
from tests.support.deploy.supervised_king import fitting_bundle
from tests.support.services import MongoServer, RabbitMQServer

KING = "from tests.support.deploy.supervised_king import main\nmain()\n"


class Rig(Checkout):
    """A checkout of the daemon on RabbitMQ and a database."""

    def __init__(
        self, folder: Path, name: str, rabbitmq: RabbitMQServer, mongo: MongoServer
    ) -> None:
        self.bundle = folder / "bundle"
        fitting_bundle(self.bundle)
        settings = {
            "broker": {"url": rabbitmq.url, "queue": name, "socket_timeout_s": 5},
            "store": {"url": mongo.url, "database": name, "timeout_s": 5},
            "features": {"ocr": {"enabled": False}},
            "fetch": {"spool": "workshop/spool"},
            "decode": {"processes": 1},
            "fusion": {"bundle": str(self.bundle)},
            "workers": {"slots": 2, "extractors": [{"threads": 1}]},
            "log": {"format": "json"},
        }
        super().__init__(folder, KING, json.dumps(settings))
        self.mongo: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(mongo.url)
        self._posts = self.mongo[name]["posts"]

    @property
    def pid(self) -> int:
        """Of the King that supervisord runs."""
        return self.client.program().pid

    def kill_worker(self, role: str) -> None:
        """Kill the process of a role."""
        [pid] = [w["pid"] for w in self.health()["workers"] if w["role"] == role]
        psutil.Process(pid).kill()

    def until(self, check: Callable[[], Any]) -> None:
        """Wait for a condition."""
        assert eventually(check, 180), self.logs()[-8000:]

    def tags(self, post_id: str) -> None:
        """Publish a post, and wait until it is tagged."""
        self._posts.insert_one({"_id": post_id, "text": "a cat"})
        publish_posts(load_settings(self.folder / "settings.yaml").broker, [PostMessage(post_id)])
        self.until(lambda: self._posts.find_one({"_id": post_id, "insight.status": "tagged"}))

    def ends(self, code: int) -> int:
        """Count the ends of the King with an exit code."""
        log = (self.run / "supervisord.log").read_text()
        return log.count(f"exited: king (exit status {code};")

    def told(self, text: str) -> int:
        """Count a text in the log of the King."""
        return (self.run / "king.log").read_text().count(text)


@pytest.fixture
def rig(
    short_path: Path, unique_name: str, rabbitmq: RabbitMQServer, mongo_server: MongoServer
) -> Iterator[Rig]:
    made = Rig(short_path, unique_name, rabbitmq, mongo_server)
    try:
        yield made
    finally:
        made.stop()
        made.mongo.close()
        with contextlib.suppress(RuntimeError):  # none is set any more
            rabbitmq.control("clear_vhost_limits")


@pytest.mark.rabbitmq
@pytest.mark.slow
def test_passing_faults_are_outlived_and_a_wrong_setting_is_not(
    rig: Rig, rabbitmq: RabbitMQServer
) -> None:
    """Many faults in one start of supervisord, since the fusion worker loads for seconds."""
    rig.start()
    rig.tags("first")
    king = rig.pid

    # A half-copied bundle when the fusion worker starts; an extractor that is killed while it
    # loads, more often in a row than a pool that never worked would stand.
    rig.until((rig.bundle.parent / ".bundle.good" / "bundle.yaml").exists)
    weights = rig.bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (rig.folder / "deadly").touch()
    rig.kill_worker("extract")
    rig.kill_worker("fuse")
    rig.until(lambda: rig.told('"worker": "extract-0", "how": "signal SIGKILL"') >= 5)
    (rig.folder / "deadly").unlink()
    rig.tags("on the last good bundle, by a new extractor")
    assert rig.told("workers.bundle_refused") == 1

    # A limit of connections, met at a reconnection.
    rabbitmq.control("set_vhost_limits", '{"max-connections": 0}')
    rabbitmq.control("close_all_connections", "a limit")
    rig.until(lambda: rig.told("limit (0) is reached"))
    rig.until(lambda: rig.health()["phase"] == "broker_down")
    assert rig.pid == king

    # A full disk, the limit and the bundle, met by a King that starts.
    (rig.folder / "full").touch()
    psutil.Process(king).kill()
    rig.until(lambda: rig.ends(1) >= 2)
    assert rig.told("No space left on device") >= 2
    (rig.folder / "full").unlink()
    rig.until(lambda: rig.health()["pid"] == rig.pid and rig.health()["phase"] == "broker_down")
    rabbitmq.control("clear_vhost_limits")
    rig.tags("after all of them")
    assert (rig.ends(0), rig.ends(2)) == (0, 0), rig.logs()
    assert rig.told("Traceback") == 0

    psutil.Process(rig.pid).terminate()
    rig.until(lambda: rig.client.program().state == "EXITED")
    assert (rig.ends(0), rig.ends(2)) == (1, 0), rig.logs()

    settings = rig.folder / "settings.yaml"
    settings.write_text(settings.read_text().replace('"slots": 2', '"slots": "two"'))
    conf = str(rig.folder / "deploy" / "supervisord.conf")
    start = [sys.executable, "-m", "supervisor.supervisorctl", "-c", conf, "start", "king"]
    subprocess.run(start, cwd="/", capture_output=True, timeout=180, check=False)
    # Told again and again: longer than supervisord waits before it starts a King anew.
    rig.until(lambda: rig.watchdog_log().count("the King is FATAL") >= 3)
    assert (rig.ends(0), rig.ends(2)) == (1, 1), rig.logs()
    assert rig.told("workers.slots") == 1
