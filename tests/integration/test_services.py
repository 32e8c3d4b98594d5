"""The servers that the other tests stand on."""

from collections.abc import Callable
from contextlib import closing

import pymongo
import pytest
import redis

from tests.support.ports import answers_tcp
from tests.support.services import MongoServer, RabbitMQServer, RedisServer, Server


def _restarts(server: Server, *ends: Callable[[], None]) -> None:
    for end in ends or (server.kill, server.stop):
        end()
        assert server.pid is None
        assert not answers_tcp(server.port)
        server.start()
        assert answers_tcp(server.port)


@pytest.mark.rabbitmq
def test_rabbitmq_comes_back_after_a_stop(rabbitmq: RabbitMQServer) -> None:
    _restarts(rabbitmq, rabbitmq.stop)


@pytest.mark.redis
def test_redis_keeps_its_data_over_a_kill(redis_server: RedisServer, unique_name: str) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.set(unique_name, b"kept")
        _restarts(redis_server)
        assert client.get(unique_name) == b"kept"


def test_nx_keeps_its_data_over_a_kill(mongo_server: MongoServer, unique_name: str) -> None:
    client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(mongo_server.url)
    with closing(client):
        client[unique_name]["posts"].insert_one({"_id": "p1"})
        _restarts(mongo_server)
        assert client[unique_name]["posts"].count_documents({}) == 1
