r"""Kombu's Redis transport, with a receive that cannot lose a message.

Kombu pops with BRPOP and records the message as unacknowledged afterwards: a process killed
between the two loses it. Here one script pops and records in a single step, so a message is at
any time either in its list or in the queue's unacked hash, under a lease that the consumer
renews. When a lease has run out, any consumer of the queue puts the message back.

Keys, for a queue ``q``: ``q`` (priority 0, where a bare LPUSH lands), ``q\x06\x161`` to
``q\x06\x169`` (kombu's names for the other priorities), ``q.unacked`` (hash: tag ─► priority
digit and item) and ``q.unacked_index`` (sorted set: tag ─► end of the lease, server's clock).

Priorities mean what they mean in AMQP: a higher number is served sooner. Kombu's own Redis
consumer has it the other way round, and reads only the lists 0, 3, 6 and 9; its publishers,
and plain ``LPUSH``, are understood as they are. What does not look like a kombu envelope is
taken as a body.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from kombu.message import Message as KombuMessage
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from king.broker.envelope import Envelope, decompressed, read_item, redelivery_of

MAX_PRIORITY = 9
RESTORE_AT_ONCE = 100

# KEYS: unacked, index, the lists from priority 9 to 0. ARGV: lease in seconds, one tag per message.
TAKE = """
local now = redis.call('TIME')
local lease_end = now[1] + now[2] / 1000000 + tonumber(ARGV[1])
local taken = {}
for i = 3, #KEYS do
  while #taken < #ARGV - 1 do
    local item = redis.call('RPOP', KEYS[i])
    if not item then break end
    local tag = ARGV[#taken + 2]
    local entry = (#KEYS - i) .. item
    redis.call('HSET', KEYS[1], tag, entry)
    redis.call('ZADD', KEYS[2], lease_end, tag)
    taken[#taken + 1] = entry
  end
end
return taken
"""

# KEYS: unacked, index, list. ARGV: tag, 'expired' or 'any', LPUSH or RPUSH, item.
GIVE_BACK = """
if ARGV[2] == 'expired' then
  local now = redis.call('TIME')
  local lease_end = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if lease_end and tonumber(lease_end) > now[1] + now[2] / 1000000 then return 0 end
end
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call(ARGV[3], KEYS[3], ARGV[4])
return 1
"""

# KEYS: index. ARGV: lease in seconds, tags.
RENEW = """
local now = redis.call('TIME')
local lease_end = now[1] + now[2] / 1000000 + tonumber(ARGV[1])
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', lease_end, ARGV[i]) end
return #ARGV - 1
"""

# KEYS: index. ARGV: how many at most.
EXPIRED = """
local now = redis.call('TIME')
local ends = now[1] + now[2] / 1000000
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ends, 'LIMIT', 0, ARGV[1])
"""


def unacked_keys(queue: str) -> dict[str, str]:
    """The keys of a queue's unacknowledged messages, as kombu's transport options."""
    return {"unacked_key": f"{queue}.unacked", "unacked_index_key": f"{queue}.unacked_index"}


@dataclass(frozen=True, slots=True)
class Taken:
    """One message as it was taken from its list."""

    tag: str
    queue: str
    priority: int
    item: bytes


class QueueMessage(KombuMessage):  # type: ignore[misc]  # kombu is untyped
    """A message whose body is bytes, whatever was on the list; never an error to construct."""

    def __init__(self, payload: Taken, channel: Any = None, **kwargs: Any) -> None:
        envelope: Envelope = read_item(payload.item)
        super().__init__(
            body=decompressed(envelope.body, envelope.compression),
            channel=channel,
            delivery_tag=payload.tag,
            delivery_info={
                "exchange": "",
                "routing_key": payload.queue,
                "redelivered": envelope.redelivered,
            },
            properties={"priority": payload.priority},
            **kwargs,
        )


class QueueQoS(virtual.QoS):  # type: ignore[misc]  # kombu is untyped
    """Acknowledgements: `TAKE` has recorded the message, so only the end of it is written here."""

    restore_at_shutdown = False  # the broker gives back what it holds, within its time-outs

    def ack(self, delivery_tag: str) -> None:
        """The message is done with."""
        self.channel.forget(delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop the message, or put it back to be served next."""
        if requeue:
            self.channel.give_back([delivery_tag])
        else:
            self.channel.forget(delivery_tag)
        super().ack(delivery_tag)


class QueueChannel(kombu_redis.Channel):  # type: ignore[misc]  # kombu is untyped
    """One channel that consumes at most one queue."""

    QoS = QueueQoS
    Message = QueueMessage
    priority_steps: ClassVar[list[int]] = list(range(MAX_PRIORITY + 1))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tags = (f"{uuid.uuid4().hex}.{i}" for i in itertools.count())
        self._outgoing: list[tuple[str, str]] = []
        self._done: list[str] = []
        super().__init__(*args, **kwargs)
        self._take = self.client.register_script(TAKE)
        self._give_back = self.client.register_script(GIVE_BACK)
        self._renew = self.client.register_script(RENEW)
        self._expired = self.client.register_script(EXPIRED)

    @cached_property
    def client(self) -> Any:
        """The one client: nothing blocks in the server, so nothing needs a second connection."""
        return self._create_client()

    def receive(self) -> int:
        """Take what the prefetch limit leaves room for and hand it to the consumers; no waiting.

        Returns:
            How many messages were handed over.
        """
        count = 0
        for queue in self.active_queues:
            room = self.qos.can_consume_max_estimate()
            for taken in self._take_from(queue, RESTORE_AT_ONCE if room is None else room):
                self.connection._deliver(taken, queue)
                count += 1
        return count

    def forget(self, tag: str) -> None:
        """Note an acknowledged message; `flush` removes it, with others, in one round trip."""
        self._done.append(tag)

    def give_back(self, tags: Iterable[str], *, expired_only: bool = False) -> int:
        """Put messages back on their list; a tag that is not there any more is passed over.

        Args:
            tags: Of the messages.
            expired_only: Only where the lease has run out, and to the end of the queue, since it
                may be what killed its consumer; otherwise to its head, to be served next.

        Returns:
            How many were put back.
        """
        tags = list(tags)
        entries = self.client.hmget(self.unacked_key, tags) if tags else []
        count = 0
        for tag, entry in zip(tags, entries, strict=True):
            priority, item = (int(entry[:1]), entry[1:]) if entry else (0, b"")
            queue = self.unacked_key.removesuffix(".unacked")
            count += self._give_back(
                keys=[self.unacked_key, self.unacked_index_key, self._q_for_pri(queue, priority)],
                args=[
                    tag,
                    "expired" if expired_only else "any",
                    "LPUSH" if expired_only else "RPUSH",
                    redelivery_of(item, queue, priority),
                ],
            )
        return count

    def give_back_expired(self) -> int:
        """Put back what other consumers took and neither acknowledged nor renewed in time."""
        tags = self._expired(keys=[self.unacked_index_key], args=[RESTORE_AT_ONCE])
        return self.give_back([tag.decode() for tag in tags], expired_only=True)

    def renew(self, tags: Iterable[str]) -> None:
        """Hold these messages for another visibility time-out."""
        tags = list(tags)
        if tags:
            self._renew(keys=[self.unacked_index_key], args=[self.visibility_timeout, *tags])

    def flush(self) -> None:
        """Send what `basic_publish` and `forget` have collected, in one round trip."""
        outgoing, self._outgoing = self._outgoing, []
        done, self._done = self._done, []
        if not outgoing and not done:
            return
        with self.client.pipeline() as pipe:
            for key, item in outgoing:
                pipe.lpush(key, item)
            if done:
                pipe.hdel(self.unacked_key, *done)
                pipe.zrem(self.unacked_index_key, *done)
            pipe.execute()

    def _put(self, queue: str, message: dict[str, Any], **_options: Any) -> None:
        priority = self._get_message_priority(message)
        self._outgoing.append((self._q_for_pri(queue, priority), json.dumps(message)))

    def _take_from(self, queue: str, room: int) -> list[Taken]:
        if room < 1:
            return []
        tags = list(itertools.islice(self._tags, room))
        lists = [self._q_for_pri(queue, p) for p in range(MAX_PRIORITY, -1, -1)]
        entries = self._take(
            keys=[self.unacked_key, self.unacked_index_key, *lists],
            args=[self.visibility_timeout, *tags],
        )
        return [
            Taken(tag, queue, int(entry[:1]), entry[1:])
            for tag, entry in zip(tags, entries, strict=False)  # fewer came than there was room for
        ]


class QueueTransport(kombu_redis.Transport):  # type: ignore[misc]  # kombu is untyped
    """The transport to name in ``kombu.Connection(url, transport=QueueTransport)``."""

    Channel = QueueChannel

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Hand over what is there now; does not wait, for the caller has housekeeping to do.

        Raises:
            TimeoutError: Nothing was there.
        """
        if not sum(channel.receive() for channel in list(self.channels)):
            raise TimeoutError("nothing to receive")
