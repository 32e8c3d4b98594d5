"""Errors at the broker's edge: all mapped, told apart, in one line and without the password."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import amqp
import amqp.exceptions
import kombu.exceptions
import pytest
import redis.exceptions

from common.errors import BrokerUnavailable, ConfigError, MessageError
from config.settings import BrokerSettings
from king.broker.base import ClientErrors
from king.broker.connect import open_broker, publish_posts, queue_depth
from king.broker.rabbitmq import RabbitBroker, shortcoming_of
from king.broker.redis import RedisBroker
from king.messages import PostMessage
from tests.support.king.broker_rig import connected, settings_for
from tests.support.mistakes import one_line
from tests.support.services import RabbitMQServer, RedisServer

URL = "amqp://insight:hunter2secret@broker.example:5672//"


def _family(base: type[BaseException]) -> Iterator[type[BaseException]]:
    yield base
    for child in base.__subclasses__():
        yield from _family(child)


OF_THE_SYSTEM = {OSError, ConnectionResetError, BrokenPipeError, TimeoutError, EOFError}
OF_RABBITMQ = {
    *_family(amqp.exceptions.AMQPError),
    *_family(kombu.exceptions.KombuError),
    amqp.exceptions.MessageNacked,
}
CASES = [
    pytest.param(kind.errors, error, id=f"{kind.__name__}-{error.__module__}.{error.__name__}")
    for kind, own in (
        (RabbitBroker, OF_RABBITMQ),
        (RedisBroker, set(_family(redis.exceptions.RedisError))),
    )
    for error in sorted(OF_THE_SYSTEM | own, key=lambda error: f"{error.__module__}.{error}")
]


@pytest.mark.parametrize(("errors", "error_type"), CASES)
def test_every_foreign_error_is_mapped(errors: ClientErrors, error_type: type[Exception]) -> None:
    """No error of kombu, py-amqp or redis gets past the edge, in work or while connecting."""
    try:
        error = error_type("it broke\nfor hunter2secret")
    except (ValueError, TypeError, IndexError):  # a few of redis's parse their text
        error = error_type("7 127.0.0.1:6379")
    for setup in (False, True):
        with (
            pytest.raises((BrokerUnavailable, ConfigError)) as caught,
            errors.mapped(URL, setup=setup),
        ):
            raise error
        shown = str(caught.value)
        assert caught.value.__cause__ is error
        assert "hunter2secret" not in shown
        assert "\n" not in shown
        assert "broker.example:5672" in shown
        if not setup:
            assert isinstance(caught.value, BrokerUnavailable)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            amqp.exceptions.NotAllowed(
                "NOT_ALLOWED - access to vhost '/' refused for user 'guest': "
                "connection limit (0) is reached"
            ),
            BrokerUnavailable,
        ),
        (
            amqp.exceptions.NotAllowed(
                "NOT_ALLOWED - connection refused for user 'guest': "
                "user connection limit (2) is reached"
            ),
            BrokerUnavailable,
        ),
        (
            amqp.exceptions.NotAllowed(
                "NOT_ALLOWED - number of channels opened for user 'guest' has reached the "
                "maximum allowed user limit of (1)"
            ),
            BrokerUnavailable,
        ),
        (
            amqp.exceptions.PreconditionFailed(
                "PRECONDITION_FAILED - cannot declare queue 'q': "
                "queue limit in vhost '/' (1) is reached"
            ),
            BrokerUnavailable,
        ),
        (amqp.exceptions.NotAllowed("NOT_ALLOWED - vhost nowhere not found"), ConfigError),
        (
            amqp.exceptions.PreconditionFailed(
                "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q'"
            ),
            ConfigError,
        ),
    ],
)
def test_a_limit_that_is_reached_passes(error: Exception, kind: type[Exception]) -> None:
    """RabbitMQ's own words, at the first connection too; a wrong setting does not pass."""
    with pytest.raises(kind), RabbitBroker.errors.mapped(URL, setup=True):
        raise error


def test_ours_pass_unchanged_and_bugs_too() -> None:
    """Our own errors are not wrapped again, and a programming error is not hidden."""
    for error in (MessageError("x"), BrokerUnavailable("y"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught, ClientErrors().mapped(URL):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("amqp://a:secretpw1@h1;amqp://b:secretpw2@h2", "one broker"),
        ("embedded://", "resolved"),
        ("http://u:secretpw1@h", r"not a broker URL; use amqp://.* redis://.* embedded://"),
        ("redis://:secretpw1@", "no host"),
        ("redis://127.0.0.1:6379/notanumber", "no host, port or database"),
        ("amqp://guest:secretpw1@127.0.0.1:99999//", "no host, port or database"),
        ("amqp://guest:secretpw1@127.0.0.1:1//?colour=blue", "not understood"),
        ("redis://:secretpw1@127.0.0.1:1/0?colour=blue", "not understood"),
    ],
)
def test_unusable_urls(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        open_broker(BrokerSettings(url=url)).connect()
    assert "secretpw" not in str(caught.value)


def _refusal(settings: BrokerSettings) -> str:
    for action in (
        open_broker(settings).connect,
        lambda: publish_posts(settings, [PostMessage("p1")]),
        lambda: queue_depth(settings),
    ):
        with pytest.raises(ConfigError) as caught:
            action()
        text = str(caught.value)
        assert "\n" not in text
        assert "wrong-pass" not in text
        assert settings.url.rpartition("@")[2].split("/")[0] in text
    return text


@pytest.mark.rabbitmq
def test_wrong_credentials_on_rabbitmq(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    base = f"127.0.0.1:{rabbitmq.port}"
    text = _refusal(settings_for(f"amqp://guest:wrong-pass@{base}//", queue_name))
    assert "user or password refused" in text
    _refusal(settings_for(f"amqp://guest:guest@{base}/nowhere", queue_name))


@pytest.mark.redis
def test_wrong_credentials_on_redis(tmp_path: Path, queue_name: str) -> None:
    if RedisServer.binary() is None:
        pytest.skip("no redis-server")
    server = RedisServer(tmp_path, password="right-password")
    server.start()
    with closing(server):
        base = f"127.0.0.1:{server.port}"
        text = _refusal(settings_for(f"redis://:wrong-pass@{base}/0", queue_name))
        assert "user or password refused" in text
        _refusal(settings_for(f"redis://{base}/0", queue_name))
        _refusal(settings_for(f"redis://:right-password@{base}/9999", queue_name))
        with connected(settings_for(server.url, queue_name)) as broker:
            broker.publish([PostMessage("p1")])
            assert broker.depth() == 1


@pytest.mark.redis
def test_a_key_of_another_type(redis_server: RedisServer, queue_name: str) -> None:
    """A queue's key that holds another type is an error at the start."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set(queue_name, "not a list")
        assert "WRONGTYPE" in _refusal(settings_for(redis_server.url, queue_name))
        client.delete(queue_name)


@pytest.mark.rabbitmq
def test_a_queue_with_other_arguments(rabbitmq: RabbitMQServer, queue_name: str) -> None:
    """A classic queue of that name, or another delivery limit, is refused in one clear line."""
    settings = settings_for(rabbitmq.url, queue_name)
    with amqp.Connection(f"127.0.0.1:{rabbitmq.port}") as client:
        client.channel().queue_declare(queue_name, durable=True, auto_delete=False)
    for action in (open_broker(settings).connect, lambda: publish_posts(settings, [])):
        with one_line(ConfigError, queue_name, match="the queue exists with other arguments"):
            action()
    assert queue_depth(settings) == 0  # asking how deep it is does not declare it

    other = settings_for(rabbitmq.url, f"{queue_name}2", delivery_limit=5)
    publish_posts(other, [])
    with pytest.raises(ConfigError, match="x-delivery-limit"):
        publish_posts(other.model_copy(update={"delivery_limit": 6}), [])


@pytest.mark.parametrize(
    ("version", "has_priorities"),
    [
        ("3.10.8", False),
        ("3.13.0", False),
        ("4.0.5", True),
        ("4.2.1+beta", True),
        ("4.3.0", True),
        ("", True),
        ("unknown", True),
    ],
)
def test_an_old_server_is_said_to_ignore_priorities(version: str, has_priorities: bool) -> None:
    reason = shortcoming_of(version)
    assert (reason is None) is has_priorities
    assert reason is None or version in reason
