"""Stores and brokers for the tests of king/."""

from collections.abc import Iterator

import pytest

from king.store.store import Store
from tests.support.fakes.store import FakeStore
from tests.support.king.store_rig import StoreRig, mongo_store
from tests.support.services import MongoServer, RabbitMQServer, RedisServer


@pytest.fixture(params=["fake", "real"])
def rig(request: pytest.FixtureRequest, unique_name: str) -> Iterator[StoreRig]:
    """An empty store of each kind."""
    if request.param == "fake":
        yield StoreRig(FakeStore())
        return
    server: MongoServer = request.getfixturevalue("mongo_server")
    store = mongo_store(server.url, unique_name)
    yield StoreRig(store)
    store.close()


@pytest.fixture
def mongo(mongo_url: str, unique_name: str) -> Iterator[Store]:
    """The real store, empty; with MongoDB too where INSIGHTTAG_TEST_MONGO_URL names one."""
    store = mongo_store(mongo_url, unique_name)
    yield store
    store.close()


@pytest.fixture(
    params=[
        pytest.param("redis_server", marks=pytest.mark.redis),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    ]
)
def broker_server(request: pytest.FixtureRequest) -> RedisServer | RabbitMQServer:
    """Each kind of real broker."""
    server: RedisServer | RabbitMQServer = request.getfixturevalue(request.param)
    return server
