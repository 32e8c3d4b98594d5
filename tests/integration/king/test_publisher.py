"""Publishing from a command: all or an error, and quickly."""

from __future__ import annotations

import time

import pytest

from config.settings import BrokerSettings
from king.broker.connect import publish_posts, queue_depth
from king.messages import PostMessage, parse_message
from tests.support.king.broker_rig import Consumer, connected, settings_for

COUNT = 1000


@pytest.fixture(
    params=[
        pytest.param("redis_server", marks=pytest.mark.redis),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
    ]
)
def settings(request: pytest.FixtureRequest, queue_name: str) -> BrokerSettings:
    """A queue on each kind of broker."""
    return settings_for(
        request.getfixturevalue(request.param).url,
        queue_name,
        heartbeat_s=10,
        socket_timeout_s=5,
        visibility_timeout_s=60,
    )


def test_a_thousand_posts_there_and_back(
    settings: BrokerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every post that was published is consumed once, over several windows of confirms."""
    start = time.monotonic()
    assert publish_posts(settings, (PostMessage(f"p{i}") for i in range(COUNT))) == COUNT
    published = time.monotonic()
    assert queue_depth(settings) == COUNT
    with connected(settings) as broker:
        begun = time.monotonic()
        consumer = Consumer(broker, ack=True)
        consumer.take(COUNT)
        ended = time.monotonic()
    assert [parse_message(body).post_id for body in consumer.bodies] == [
        f"p{i}" for i in range(COUNT)
    ]
    assert queue_depth(settings) == 0
    with capsys.disabled():
        kind = settings.url.split(":")[0]
        rates = COUNT / (published - start), COUNT / (ended - begun)
        print(f"\n{kind}: {rates[0]:.0f} published/s, {rates[1]:.0f} consumed/s")  # noqa: T201


def test_nothing_to_publish(settings: BrokerSettings) -> None:
    """No messages: 0, and the queue is there afterwards."""
    assert publish_posts(settings, []) == 0
    assert queue_depth(settings) == 0


def test_a_failing_source_is_not_hidden(settings: BrokerSettings) -> None:
    """An error of the iterable reaches the caller as it is, and the connection is closed."""

    def source() -> object:
        yield PostMessage("p1")
        raise RuntimeError("the file could not be read")

    with pytest.raises(RuntimeError, match="could not be read"):
        publish_posts(settings, source())  # type: ignore[arg-type]
