"""Posts by ID over a real Redis and a real database: published, and read in every state."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import Int64, ObjectId

from config.settings import Settings
from king.broker.connect import queue_depth
from king.messages import PostMessage, parse_message
from king.store.documents import id_text
from tests.support.fakes.pool import FakePool
from tests.support.king.broker_rig import Consumer, connected
from tests.support.services import MongoServer, RedisServer
from tests.support.web.fixtures import Desk, desk_settings, make_desk


@pytest.fixture
def settings(
    tmp_path: Path, redis_server: RedisServer, mongo_server: MongoServer, unique_name: str
) -> Settings:
    """A queue and a database of this test alone."""
    plain = desk_settings(tmp_path)
    broker = plain.broker.model_copy(
        update={"url": redis_server.url, "queue": f"{unique_name}.posts", "socket_timeout_s": 2}
    )
    store = plain.store.model_copy(
        update={"url": mongo_server.url, "database": unique_name, "timeout_s": 2}
    )
    return plain.model_copy(update={"broker": broker, "store": store})


@pytest.fixture
def posts(tmp_path: Path, settings: Settings) -> Iterator[Desk]:
    (tmp_path / "downloads").mkdir()
    for desk in make_desk(settings, FakePool(tmp_path / "downloads")):
        desk.runner.start()
        yield desk


@pytest.fixture
def database(settings: Settings) -> Iterator[Any]:
    client: pymongo.MongoClient[Any] = pymongo.MongoClient(settings.store.url)
    yield client[settings.store.database]
    client.close()


def bodies(settings: Settings) -> list[PostMessage]:
    """Take what waits off the queue."""
    with connected(settings.broker) as broker:
        consumer = Consumer(broker, ack=True)
        consumer.take(queue_depth(settings.broker))
    return [parse_message(body) for body in consumer.bodies]


def test_a_post_is_published(posts: Desk, settings: Settings, database: Any) -> None:
    client = posts.client
    database["posts"].insert_one({"_id": "p2"})
    unknown = client.post("/v1/posts/p1")
    assert unknown.status_code == 202
    assert "has no such post" in unknown.json["warning"]
    answer = client.post("/v1/posts/p2", json={"priority": 7, "force": True})
    assert (answer.status_code, answer.json) == (202, {"post_id": "p2", "state": "queued"})
    assert client.post("/v1/posts/a//b%2F%E7%8C%AB").json["post_id"] == "a//b/猫"
    assert client.post("/v1/posts/p3", json={"priority": 99}).status_code == 400
    assert queue_depth(settings.broker) == 3
    assert {(m.post_id, m.priority, m.force) for m in bodies(settings)} == {
        ("p1", 0, False),
        ("p2", 7, True),
        ("a//b/猫", 0, False),
    }


def test_every_state_of_a_post(posts: Desk, database: Any) -> None:
    """Its result as stored; or that it waits, runs, or is dead, and why; 404 for a stranger."""
    result = {
        "model": "demo",
        "version": "1",
        "status": "tagged",
        "tags": [{"id": 1, "name": "雨", "score": 0.7}],
        "modalities": {"text": "ok"},
        "tagged_at": datetime(2026, 1, 2),
    }
    database.posts.insert_many(
        [
            {"_id": "new", "text": "x"},
            {"_id": "done", "text": "x", "insight": result},
            {"_id": "broken", "insight": {**result, "status": "failed", "tags": []}},
            {"_id": 42, "text": "x"},
            {"_id": "running", "text": "x", "insight": result},
        ]
    )
    error = {"stage": "decode", "type": "MediaError", "message": "truncated"}
    database.jobs.insert_many(
        [
            {"_id": "running", "state": "running", "attempts": 1},
            {"_id": "42", "state": "waiting", "attempts": 2, "due_at": 5.0, "last_error": error},
            {"_id": "dead", "state": "dead", "attempts": 5, "last_error": error},
        ]
    )
    answers = {
        name: posts.client.get(f"/v1/posts/{name}")
        for name in ("new", "done", "broken", "42", "running", "dead", "stranger")
    }
    states = {name: answer.json.get("state") for name, answer in answers.items()}
    assert states == {
        "new": "untagged",
        "done": "tagged",
        "broken": "failed",
        "42": "queued",
        "running": "in_flight",
        "dead": "dead",
        "stranger": None,
    }
    assert answers["stranger"].status_code == 404
    assert answers["stranger"].json["error"]["type"] == "PostNotFound"
    assert answers["done"].json["result"]["tags"] == result["tags"]
    assert answers["done"].json["result"]["tagged_at"].startswith("2026-01-02T00:00:00")
    assert answers["running"].json["result"]["status"] == "tagged"
    assert answers["dead"].json["job"] == {
        "state": "dead",
        "attempts": 5,
        "due_at": None,
        "error": error,
    }
    assert answers["42"].json["job"]["due_at"] == "1970-01-01T00:00:05+00:00"


@pytest.mark.parametrize("value", [Int64(1212092628029698048), -7, 2.0**31 + 2, 1.5, ObjectId()])
def test_a_post_is_found_by_the_text_of_its_id(posts: Desk, database: Any, value: Any) -> None:
    """To be published without a warning, and to be read; `test_ids.py` has every type."""
    database.posts.insert_one({"_id": value, "text": "x"})
    path = f"/v1/posts/{id_text(value)}"
    assert posts.client.get(path).json["state"] == "untagged"
    assert posts.client.post(path).json == {"post_id": id_text(value), "state": "queued"}


def test_a_result_that_the_platform_has_written_into_is_shown(posts: Desk, database: Any) -> None:
    """Values that JSON lacks are texts, and a job whose time is no date has none."""
    odd = {"oid": ObjectId(), "at": datetime(2026, 1, 2), "raw": b"x", "deep": [{"no": 2**62}]}
    database.posts.insert_one({"_id": "p1", "insight": {"status": "tagged", **odd}})
    database.jobs.insert_one({"_id": "p1", "state": "queued", "attempts": 1e300, "due_at": 1e300})
    answer = posts.client.get("/v1/posts/p1")
    assert answer.status_code == 200
    result = answer.json["result"]
    assert (result["oid"], result["deep"]) == (str(odd["oid"]), odd["deep"])
    assert result["at"] == "2026-01-02T00:00:00+00:00"
    assert answer.json["job"]["due_at"] == "1970-01-01T00:00:00+00:00"


def test_readiness_follows_the_servers(
    posts: Desk, redis_server: RedisServer, mongo_server: MongoServer
) -> None:
    client = posts.client
    assert client.get("/readyz").json["parts"] == {"workers": "ok", "broker": "ok", "store": "ok"}
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/posts/p1").status_code == 202
    redis_server.stop()
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json["parts"]["store"] == "ok"
    assert "BrokerUnavailable" in answer.json["parts"]["broker"]
    assert client.post("/v1/posts/p1").status_code == 503
    assert client.post("/v1/tag", json={"text": "x"}).status_code == 200
    redis_server.start()
    assert client.get("/v1/posts/none").status_code == 404
    mongo_server.stop()
    assert "StoreUnavailable" in client.get("/readyz").json["parts"]["store"]
    assert client.get("/v1/posts/none").status_code == 503
    mongo_server.start()
    assert client.get("/readyz").status_code == 200
    assert client.get("/v1/posts/none").status_code == 404
