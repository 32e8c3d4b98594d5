"""The least that a consumer does, with kombu and pymongo and no model.

An ID comes off the queue, its document is read, a result is written, the message is acknowledged:
one by one, or in batches by one find and one bulk write. Ends when the queue is empty, and prints
as JSON what it has settled, when, and its CPU seconds for it.

Run: ``python bench/peers/bare.py BROKER_URL STORE_URL DATABASE QUEUE BATCH``.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from typing import Any

import kombu
from pymongo import MongoClient, UpdateOne

# As many as a batch and as many again on the way; one by one, what clients take by default or so.
_PREFETCH = 32
# A queue without a message for so long is empty; a half-filled batch waits for it, outside of what
# is counted where it is the last.
_EMPTY_S = 2.0


def result() -> dict[str, Any]:
    """Return a result as large as the daemon's."""
    return {
        "model": "bare",
        "version": "1",
        "status": "tagged",
        "tags": [{"id": 0, "name": "cat", "score": 0.51}, {"id": 1, "name": "dog", "score": 0.5}],
        "modalities": dict.fromkeys(("video", "image", "audio", "text", "ocr", "asr"), "missing"),
        "failures": {},
        "error": None,
        "attempts": 1,
        "tagged_at": datetime.now(timezone.utc),
        "timings_ms": {"extract": 1, "fuse": 1, "total": 3},
    }


class Consumer:
    """Settles messages in batches of a size.

    Attributes:
        settled: How many.
        began: Unix time and CPU seconds at the first message.
        ended: The same at the last.
    """

    def __init__(self, posts: Any, batch: int) -> None:
        self.settled = 0
        self.began: tuple[float, float] | None = None
        self.ended = (0.0, 0.0)
        self._posts, self._batch = posts, batch
        self._waiting: list[tuple[str, Any]] = []

    def take(self, message: Any) -> None:
        """Take a message; a full batch is settled."""
        self.began = self.began or (time.time(), time.process_time())
        self._waiting.append((json.loads(message.body)["post_id"], message))
        if len(self._waiting) >= self._batch:
            self.settle()

    def settle(self) -> None:
        """Read, write and acknowledge what waits."""
        waiting, self._waiting = self._waiting, []
        ids = [post_id for post_id, _ in waiting]
        if len(ids) == 1:
            if self._posts.find_one({"_id": ids[0]}) is not None:
                self._posts.update_one({"_id": ids[0]}, {"$set": {"insight": result()}})
        elif ids:
            known = [post["_id"] for post in self._posts.find({"_id": {"$in": ids}})]
            writes = [UpdateOne({"_id": each}, {"$set": {"insight": result()}}) for each in known]
            self._posts.bulk_write(writes, ordered=False)
        for _, message in waiting:
            message.ack()
        if waiting:
            self.settled += len(waiting)
            self.ended = (time.time(), time.process_time())


def main(arguments: list[str]) -> int:
    """Settle what is on the queue."""
    broker, store, database, queue, batch = arguments
    client: MongoClient[dict[str, Any]] = MongoClient(store, directConnection=True)
    consumer = Consumer(client[database]["posts"], int(batch))
    settled = -1
    with kombu.Connection(broker) as connection:
        channel = connection.channel()
        channel.basic_qos(0, max(_PREFETCH, 2 * int(batch)), False)
        source = kombu.Queue(queue, no_declare=True)
        with kombu.Consumer(channel, queues=[source], on_message=consumer.take):
            while settled < consumer.settled:
                try:
                    connection.drain_events(timeout=_EMPTY_S)
                except TimeoutError:
                    settled = consumer.settled
                    consumer.settle()
    began, ended = consumer.began or consumer.ended, consumer.ended
    times = {"began_at": began[0], "ended_at": ended[0], "cpu_s": ended[1] - began[1]}
    print(json.dumps({"settled": consumer.settled, **times}))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(f"usage: {(__doc__ or '').strip().splitlines()[-1][5:]}")
    sys.exit(main(sys.argv[1:]))
