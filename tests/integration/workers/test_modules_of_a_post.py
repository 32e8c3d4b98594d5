"""A person who follows one post reads few modules: they are counted while a post is tagged."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config.settings import BrokerSettings
from extractors.suite import ExtractorSuite
from king.broker.connect import open_broker, publish_posts
from king.messages import PostMessage
from king.store.client import StoreClient
from king.store.store import Store
from tests.support import media
from tests.support.king.king_rig import Running
from tests.support.king.store_rig import mongo_settings
from tests.support.processes import file_server
from tests.support.services import MongoServer, RedisServer
from tests.support.tiny_models import tiny_features
from tests.support.workers.driving import toy_settings
from tests.support.workers.small_bundle import write_bundle
from tests.support.workers.tracing import FOLDER, TRACED, Trace
from workers.pool.pool import ProcessPool

LIMIT = 35
"""docs/architecture.md lists them."""


@pytest.mark.redis
def test_a_post_passes_few_modules(
    *,
    redis_server: RedisServer,
    mongo_server: MongoServer,
    queue_name: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A post with a text and a picture on Redis, from message to ack, without the cache."""
    notes, site = tmp_path / "notes", tmp_path / "site"
    notes.mkdir()
    site.mkdir()
    media.write_png(site / "a.png", media.quadrants(90, 70))
    features = tiny_features(ocr=True)
    with closing(ExtractorSuite(features, threads=1)) as suite:
        suite.load()
        write_bundle(tmp_path / "bundle", suite)
    settings = toy_settings(
        tmp_path / "spool",
        fetch={"allow_private_hosts": True},
        features=features.model_dump(),
        fusion={"bundle": str(tmp_path / "bundle")},
        king={"health_file": str(tmp_path / "king.json")},
        broker=BrokerSettings(url=redis_server.url, queue=queue_name).model_dump(),
        store=mongo_settings(mongo_server.url, unique_name).model_dump(),
    )
    monkeypatch.setenv(FOLDER, str(notes))
    store, broker = Store(StoreClient(settings.store)), open_broker(settings.broker)
    store.connect()
    broker.connect()
    trace = Trace(("king-broker", "king-store", "king-dispatch"))
    pool: Any = ProcessPool(settings, roles=TRACED)
    try:
        with file_server(site) as url, Running(settings, pool) as running:
            document = {"_id": "p1", "text": "a cat", "images": [f"{url}/a.png"]}
            store.client.posts.insert_one(document)
            running.until(lambda: pool.ready, 180)
            running.until((tmp_path / ".bundle.good").is_dir)  # the last work of a start
            tell(pool, signal.SIGUSR1)
            trace.on = True  # the King's own loop, which watches its threads, is not noted
            publish_posts(settings.broker, [PostMessage("p1")])
            running.until(lambda: store.queries.counts()["tagged"] == 1 and not broker.depth())
            running.until(lambda: not running.king.in_flight)
            trace.stop()
            tell(pool, signal.SIGUSR2)
            names = {view.name for view in pool.workers}
            running.until(lambda: names <= {path.name for path in notes.iterdir()})
    finally:
        trace.stop()
        store.close()
        broker.close()
    modules = trace.modules.union(*((notes / name).read_text().splitlines() for name in names))
    assert {
        "workers/post_run.py",
        "fusion/infer/inferer.py",
        "extractors/media/decode.py",
    } <= modules
    modules.discard("common/errors.py")  # something waited for too long on a busy host
    assert len(modules) <= LIMIT, "\n".join([f"{len(modules)} modules:", *sorted(modules)])


def tell(pool: ProcessPool, number: int) -> None:
    for view in pool.workers:
        if view.pid is not None:
            os.kill(view.pid, number)
    time.sleep(0.2)  # its handler runs between two instructions, of whatever it does
