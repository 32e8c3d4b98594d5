r"""Redis, over redis-py: lists, and leases on the messages in hand.

Keys of a queue ``q``: ``q`` (priority 0, where a bare LPUSH lands), ``q\x06\x161`` to
``q\x06\x169`` (kombu's names of the other priorities), ``q.unacked`` (hash: tag -> priority digit
and item) and ``q.unacked_index`` (sorted set: tag -> end of the lease, by the server's clock).

An item is an envelope as kombu's publishers write it, or else a bare body. What we publish is an
envelope too, so that kombu's consumers read it.

Priorities mean what they mean in AMQP: a higher number is served sooner. Kombu's own Redis
consumer has it the other way round, and reads only the lists 0, 3, 6 and 9.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import redis
import redis.exceptions as redis_errors
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from common.errors import ConfigError, PublishRefused, one_line
from common.urls import redact
from config.settings import BrokerSettings
from king.broker.base import (
    PUBLISH_WINDOW,
    Broker,
    ClientErrors,
    Delivery,
    Prefetch,
    require_host,
)
from king.messages import MAX_PRIORITY, MIN_PRIORITY, PostMessage, decompressed

# Pause between two looks at an empty queue: the first one, and doubled from look to look the
# longest. Redis has no command that waits for a message and also notes who took it. With half of
# the longest, an idle King costs Redis and itself twice as much; with double, the first post after
# a pause waits up to half a second for nothing.
_FIRST_POLL_S = 0.01
_LONGEST_POLL_S = 0.25

# Expired messages given back at a time. Each is a round trip, in which no post is taken: ten times
# as many would hold up the queue for a noticeable time, and the rest follows a few seconds later.
_GIVE_BACK_AT_ONCE = 100

# The most seconds between two looks for expired leases, and so the most that a dead consumer's
# messages wait longer than their lease. Half of it only costs round trips.
_COLLECT_EVERY_S = 5.0

_SCRIPT = Path(__file__).with_name("redis.lua").read_text(encoding="ascii")

_REFUSALS = (
    redis_errors.AuthenticationError,
    redis_errors.AuthorizationError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
    redis_errors.NoPermissionError,
)

# Answers of a Redis that is there but cannot serve now; other refusals are wrong settings.
_PASSING = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.ExecAbortError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
    redis_errors.NoScriptError,
)
_PASSING_WORDS = {"LOADING", "MISCONF", "MASTERDOWN", "NOREPLICAS", "UNKILLABLE", "BUSY"}


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, _REFUSALS):
        return True
    if not isinstance(error, redis_errors.ResponseError) or isinstance(error, _PASSING):
        return False
    return not any(word in _PASSING_WORDS for word in str(error).split())


class RedisBroker(Broker):
    """A queue in Redis (``redis://``, ``rediss://``, ``unix://PATH``) that cannot lose a message.

    A script takes a message from its list and records it under a lease in one step. When that has
    run out, any consumer puts the message back: to the end, since it may have killed its consumer.
    """

    errors: ClassVar[ClientErrors] = ClientErrors(
        types=(redis_errors.RedisError, OSError, EOFError),
        is_refusal=_is_refusal,
        hints={redis_errors.AuthenticationError: "user or password refused, or no permission ({})"},
    )

    def __init__(self, settings: BrokerSettings, prefetch: Prefetch | None = None) -> None:
        if not settings.url.startswith("unix://"):
            require_host(settings.url)
        super().__init__(settings, prefetch)
        self._options = _client_options(settings)
        queue = settings.queue
        self._lists = [f"{queue}\x06\x16{p}" if p else queue for p in range(MAX_PRIORITY + 1)]
        self._unacked = [f"{queue}.unacked", f"{queue}.unacked_index"]
        self._client: Any = None  # redis-py's types do not tell sync answers from async ones
        self._script: Any = None
        self._tag_prefix = ""
        self._tag_numbers = itertools.count()
        self._is_empty = True  # by the last answer
        self._poll_s = _FIRST_POLL_S
        self._asked: list[str] = []  # tags of a `take` whose answer has not come
        self._renew_every_s = settings.visibility_timeout_s / 4
        self._renewal_due = self._collection_due = 0.0

    def _open(self, declare: bool) -> None:
        self._client = redis.Redis(connection_pool=redis.ConnectionPool(**self._options))
        self._script = self._client.register_script(_SCRIPT)
        self._tag_prefix = uuid.uuid4().hex
        try:
            self._client.ping()
        except (TypeError, ValueError) as error:  # redis-py takes the query for its own arguments
            raise ConfigError(
                f"broker.url: {redact(self.settings.url)!r} has a part that is not understood"
            ) from error
        self._size(self._lists)  # raises if the key is of another type
        self.shortcoming = self._eviction_risk()
        # A connection lost in a `take` may have cost the answer alone: the messages are taken then,
        # and without this would wait for the end of their lease.
        self._give_back([*reversed(self._asked), *reversed(self._in_hand)])
        self._asked = []
        self._renewal_due = time.monotonic() + self._renew_every_s
        self._collection_due = 0.0

    def _eviction_risk(self) -> str | None:
        """Return why a server that is full would delete the queue; None if it would not."""
        with contextlib.suppress(redis_errors.ResponseError):  # a user who may not ask
            policy = self._client.info("memory").get("maxmemory_policy", "")
            if policy.startswith("allkeys"):
                return (
                    f"Redis deletes the queue when its memory is full: maxmemory-policy {policy}; "
                    "set noeviction, or a volatile one, for the queue does not expire"
                )
        return None

    def drain(self, timeout_s: float) -> int:
        with self._client_call():
            end = time.monotonic() + (0.0 if self._inbox else timeout_s)
            self._flush()
            while True:
                self._look_after_leases()
                self._keep_pace()
                self._take()
                left_s = end - time.monotonic()
                self._poll_s = min(2 * self._poll_s, _LONGEST_POLL_S)
                if self._inbox:
                    self._poll_s = _FIRST_POLL_S
                if self._inbox or left_s <= 0 or self._waker.wait(min(left_s, self._poll_s))[0]:
                    break
        return self._hand_over()

    def _look_after_leases(self) -> None:
        now = time.monotonic()
        if now >= self._renewal_due:
            self._renewal_due = now + self._renew_every_s
            if self._in_hand:
                self._run("renew", self.settings.visibility_timeout_s, *self._in_hand)
        if now >= self._collection_due:
            self._collection_due = now + min(_COLLECT_EVERY_S, self._renew_every_s)
            tags = self._run("expired", _GIVE_BACK_AT_ONCE)
            self._give_back(tags, expired_only=True)

    def _take(self) -> None:
        room = self._window - len(self._in_hand)
        if self._on_delivery is None or room < 1:
            return
        # An empty queue is asked for one message, since each one asked for costs a tag.
        count = 1 if self._is_empty else room
        tags = [f"{self._tag_prefix}.{next(self._tag_numbers)}" for _ in range(count)]
        self._asked = tags
        entries = self._run(
            "take", self.settings.visibility_timeout_s, *tags, lists=reversed(self._lists)
        )
        self._asked = []
        self._is_empty = not entries
        for tag, entry in zip(tags, entries, strict=False):  # fewer may come than were asked for
            self._receive(entry[1:], tag, read_item)

    def requeue(self, delivery: Delivery) -> bool:
        return self._settle(delivery) and self._succeeds(lambda: self._give_back([delivery.token]))

    def publish(self, messages: Iterable[PostMessage]) -> int:
        count = 0
        iterator = iter(messages)
        while window := list(itertools.islice(iterator, PUBLISH_WINDOW)):
            items: dict[str, list[str]] = {}
            for message in window:
                priority = min(max(message.priority, MIN_PRIORITY), MAX_PRIORITY)
                item = _envelope(
                    message.encode(), self.settings.queue, priority, "application/json"
                )
                items.setdefault(self._lists[priority], []).append(json.dumps(item))
            with self._client_call():
                for key, values in items.items():
                    try:
                        self._client.lpush(key, *values)
                    except redis_errors.OutOfMemoryError as error:
                        where = redact(self.settings.url)
                        raise PublishRefused(f"broker {where}: {one_line(error)}") from error
            count += len(window)
        return count

    def depth(self, queue: str | None = None) -> int:
        suffixes = [key.removeprefix(self.settings.queue) for key in self._lists]
        with self._client_call():
            return self._size([(queue or self.settings.queue) + suffix for suffix in suffixes])

    def unacknowledged(self) -> int:
        with self._client_call():
            return int(self._client.hlen(self._unacked[0]))

    def _size(self, lists: Iterable[str]) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for key in lists:
                pipe.llen(key)
            return sum(pipe.execute())

    def _flush(self) -> None:
        """Remove the acknowledged messages from the server, in one round trip."""
        if self._acked:
            self._run("ack", *self._acked)
            # Kept until now: after a lost connection they are sent again.
            self._acked.clear()

    def _give_back(self, tags: Iterable[int | str | bytes], *, expired_only: bool = False) -> None:
        """Put messages back on their lists, to be served next; drop leases without a message.

        With ``expired_only``, only if the lease has run out, and to the end of the queue.
        """
        tags = list(tags)
        entries = self._client.hmget(self._unacked[0], tags) if tags else []
        for tag, stored in zip(tags, entries, strict=True):
            entry = stored or b""
            # One of a stranger is a body as it stands, which is refused with a reason.
            priority, item = (int(entry[:1]), entry[1:]) if entry[:1].isdigit() else (0, entry)
            self._run(
                "give_back",
                tag,
                "expired" if expired_only else "any",
                "LPUSH" if expired_only else "RPUSH",
                redelivery_of(item, self.settings.queue, priority),
                lists=[self._lists[priority]],
            )

    def _run(self, command: str, *args: Any, lists: Iterable[str] = ()) -> Any:
        return self._script(keys=[*self._unacked, *lists], args=[command, *args])

    def _leave(self) -> None:
        self._flush()
        self._give_back(reversed(self._in_hand))

    def _abandon(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.connection_pool.disconnect()


def _client_options(settings: BrokerSettings) -> dict[str, Any]:
    """Return the arguments of the connection pool; the URL's query overrides ours."""
    on_socket = settings.url.startswith("unix://")
    try:
        if not on_socket:
            int(urlsplit(settings.url).path.strip("/") or 0)
        options = parse_url(settings.url)  # type: ignore[no-untyped-call]  # redis-py lacks its types
    except ValueError as error:
        raise ConfigError(
            f"broker.url: {redact(settings.url)!r} names no host, port or database"
        ) from error
    requirement = options.get("ssl_cert_reqs")
    if isinstance(requirement, str):  # as in amqps:// URLs, CERT_NONE may be written too
        options["ssl_cert_reqs"] = requirement.removeprefix("CERT_").lower()
    if settings.url.startswith("rediss://"):
        options = {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **options}
    if not on_socket:
        options = {"socket_keepalive": True, **options}
    return {
        "socket_timeout": settings.socket_timeout_s,
        "socket_connect_timeout": settings.socket_timeout_s,
        "health_check_interval": settings.heartbeat_s,
        "client_name": "insighttag",
        # The owner connects again. redis-py would send a command twice, and so take messages
        # under tags that nobody knows.
        "retry": Retry(NoBackoff(), 0),
        **options,
    }


def read_item(item: bytes) -> tuple[bytes, bool, object]:
    """Read an item of a list: the body, decompressed, True if delivered before, and the headers.

    What cannot be read is a body as it stands: `king.messages` then refuses it with a reason.
    """
    envelope = _parsed(item)
    if envelope is None:
        return item, False, None
    headers = envelope.get("headers")
    redelivered = isinstance(headers, dict) and headers.get("redelivered") is True
    body = _body_of(envelope)
    plain = item if body is None else decompressed(body, headers)
    return plain, redelivered, headers


def redelivery_of(item: bytes, queue: str, priority: int) -> bytes:
    """Return the item marked as delivered before, in an envelope that kombu reads too."""
    try:
        envelope = _parsed(item)
        if envelope is None or _body_of(envelope) is None:  # delivered as a bare body
            envelope = _envelope(item, queue, priority, "application/octet-stream", "binary")
        headers = envelope.get("headers")
        envelope["headers"] = {
            **(headers if isinstance(headers, dict) else {}),
            "redelivered": True,
        }
        return json.dumps(envelope).encode()
    except RecursionError:  # nested so deep that it can be read but not written
        return item


def _envelope(
    body: bytes, queue: str, priority: int, content_type: str, encoding: str = "utf-8"
) -> dict[str, Any]:
    return {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": encoding,
        "headers": {},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": uuid.uuid4().hex,  # what kombu's consumers file it under
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_mode": 2,
            "priority": priority,
        },
    }


def _parsed(item: bytes) -> dict[str, Any] | None:
    """Return a kombu envelope; None for anything else."""
    if not item.startswith(b"{"):
        return None
    try:
        content = json.loads(item)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "body" not in content:
        return None
    return content if isinstance(content.get("properties"), dict) else None


def _body_of(envelope: dict[str, Any]) -> bytes | None:
    """Return the body's bytes; None if the envelope does not hold what it claims."""
    body = envelope["body"]
    if not isinstance(body, str):
        return None
    encoding = envelope["properties"].get("body_encoding")
    if isinstance(encoding, str) and encoding.lower() == "base64":
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            return None
    return body.encode("utf-8", "surrogatepass")
