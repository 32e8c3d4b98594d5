"""The King's threads together, on a queue, a store and workers in memory."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import structlog

from config.settings import CacheSettings
from king.jobs import message_key
from king.messages import PostMessage
from king.status import read_health
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.pool import DIED, Answer, default_answer
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import (
    Gate,
    Running,
    fake_pool,
    king_settings,
    on_fakes,
    posts,
    queue_of,
)
from workers.protocol import (
    CacheHit,
    CacheHits,
    CacheLookup,
    Decoded,
    DecodeTask,
    FuseTask,
    Task,
)


def test_posts_are_tagged_and_acknowledged_after_the_write(tmp_path: Path) -> None:
    store = FakeStore(posts("p1", "p2", 3, images=["http://user:pw@host/1.jpg"]))
    broker = MemoryBroker(queue_of(b"p1", b'{"post_id": "p2", "priority": 5}', b"3"))
    acked_too_early: list[bytes] = []
    ack = broker.ack

    def watch(delivery: Any) -> bool:
        acked_too_early.extend(key.encode() for key in store.jobs)
        return ack(delivery)

    broker.ack = watch  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as logs, on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 3)
    assert it.exit_code == 0
    assert {post["insight"]["status"] for post in store.posts.values()} == {"tagged"}
    assert store.jobs == {}
    assert acked_too_early == []
    lines = [line for line in logs if line["event"] == "king.post_tagged"]
    assert {line["post_id"] for line in lines} == {"p1", "p2", "3"}
    assert lines[0]["attempt"] == 1
    assert lines[0]["tags"] == ["sport"]
    assert lines[0]["modalities"]["image"] == "ok"
    assert {"fetch", "decode", "extract", "fuse"} <= lines[0]["timings_ms"].keys()
    assert "pw" not in json.dumps(logs, default=str)
    assert store.closed
    assert it.pool.stopped


def test_messages_that_cannot_be_served_are_dead_letters(tmp_path: Path) -> None:
    store = FakeStore([*posts("good"), {"_id": "empty"}])
    broker = MemoryBroker(queue_of(b"\xff\xfe", b"{", b"", b"nobody", b"empty", b"good"))
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == 6)
    assert it.exit_code == 0
    assert store.posts["good"]["insight"]["status"] == "tagged"
    assert store.posts["empty"]["insight"]["error"]["type"] == "NothingUsable"
    stages = {key: job.last_error and job.last_error["stage"] for key, job in store.jobs.items()}
    assert stages == {
        message_key("\\xff\\xfe"): "message",
        message_key("{"): "message",
        message_key(""): "message",
        "nobody": "load",
        "empty": "load",
    }
    assert {job.state for job in store.jobs.values()} == {"dead"}
    assert store.jobs[message_key("{")].payload == "{"


def test_second_messages_of_a_running_post_delay_nobody(tmp_path: Path) -> None:
    """More of them than may be in hand pass while it runs; its own message waits for its end."""
    store, gate = FakeStore(posts("p1", "p2")), Gate()
    broker = MemoryBroker(queue_of(b"p1", *[b'"p1"'] * 500, b"p2"))
    pool = fake_pool(tmp_path, gate)
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: sum(isinstance(task, FuseTask) for task in pool.submitted) == 2)
        it.until(lambda: len(broker.acked) == 500)
        assert [d.body for d in broker.unacked.values()] == [b"p1", b"p2"]
        assert it.king.status.counter("settled") == 500
        gate.open.set()
        it.until(lambda: len(broker.acked) == 502)
    assert sum(isinstance(task, FuseTask) for task in pool.submitted) == 2


def test_tagged_post_is_settled_and_forced_post_is_not(tmp_path: Path) -> None:
    done = {"model": "fake", "version": "1", "status": "tagged", "tags": []}
    store = FakeStore(posts("p1", "p2", insight=done))
    broker = MemoryBroker(queue_of(b"p1", PostMessage("p2", force=True).encode()))
    pool = fake_pool(tmp_path)
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 2)
        assert it.king.status.counter("settled") == 1
    fused = [task.features.post_id for task in pool.submitted if isinstance(task, FuseTask)]
    assert fused == ["p2"]


def tagged_backlog(count: int) -> tuple[list[str], list[dict[str, Any]]]:
    """IDs, and their posts, which the fake bundle has tagged."""
    ids = [f"p{i}" for i in range(count)]
    return ids, posts(*ids, insight={"status": "tagged", "model": "fake", "version": "1"})


def test_a_backlog_of_tagged_posts_is_looked_up_in_whole_batches(tmp_path: Path) -> None:
    """Each question to a database costs as much for one post as for all in hand."""
    sizes: list[int] = []

    class Counting(FakeStore):
        """Notes how many posts are asked for at a time."""

        def begin(self, claims: Any, context: Any) -> Any:
            """As `FakeStore`."""
            sizes.append(len(claims))
            return super().begin(claims, context)

    ids, documents = tagged_backlog(320)
    store = Counting(documents)
    broker = MemoryBroker(queue_of(*map(str.encode, ids)), prefetch=32)
    with on_fakes(tmp_path, store, broker) as it:
        it.until(lambda: len(broker.acked) == len(ids))
    assert sum(sizes) == len(ids)
    assert len(sizes) <= 30, sizes


def test_a_backlog_of_tagged_posts_is_not_slept_through(tmp_path: Path) -> None:
    """The acks of one batch bring the next: waiting as for an empty queue would bound the rate."""
    ids, documents = tagged_backlog(320)

    class Watched(MemoryBroker):
        """Counts how often a look at the queue that waits is ended."""

        wakes = 0

        def wake(self) -> None:
            """As `MemoryBroker`."""
            self.wakes += 1
            super().wake()

    broker = Watched(queue_of(*map(str.encode, ids)), prefetch=32)
    with on_fakes(tmp_path, FakeStore(documents), broker) as it:
        it.until(lambda: len(broker.acked) == len(ids))
        assert broker.wakes >= 10


def test_retryable_failures_come_back_until_they_succeed(tmp_path: Path) -> None:
    deaths = iter((DIED, DIED))

    def answer(task: Task) -> Answer:
        return next(deaths, None) or default_answer(task)

    store = FakeStore(posts("p1"))
    broker = MemoryBroker(queue_of(b"p1"))
    with (
        structlog.testing.capture_logs() as logs,
        Running(
            king_settings(tmp_path, attempts=5),
            fake_pool(tmp_path, answer),
            store=store,
            broker=broker,
        ) as it,
    ):
        it.until(lambda: store.posts["p1"].get("insight"))
        it.until(lambda: len(broker.acked) == 3)
    assert store.posts["p1"]["insight"]["attempts"] == 3
    assert store.jobs == {}
    assert [m.post_id for m in broker.published] == ["p1", "p1"]
    retries = [line for line in logs if line["event"] == "king.post_retry"]
    assert [line["attempt"] for line in retries] == [1, 2]


def test_exhausted_attempts_are_a_dead_letter(tmp_path: Path) -> None:
    store = FakeStore(posts("p1"))
    broker = MemoryBroker(queue_of(b"p1"))
    pool = fake_pool(
        tmp_path, lambda task: DIED if isinstance(task, FuseTask) else default_answer(task)
    )
    with Running(king_settings(tmp_path), pool, store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 3)
        assert it.king.status.counter("dead") == 1
    assert store.jobs["p1"].state == "dead"
    assert store.jobs["p1"].attempts == 3
    assert store.posts["p1"]["insight"]["error"]["type"] == "WorkerDied"


def test_health_file_shows_progress(tmp_path: Path) -> None:
    """The file is there within a second or so, is whole, and has what the watchdog judges by."""
    ids = [f"p{i}" for i in range(5)]
    store, gate = FakeStore(posts(*ids)), Gate()
    broker = MemoryBroker(queue_of(*[i.encode() for i in ids]), prefetch=2)
    settings = king_settings(tmp_path)
    with Running(settings, fake_pool(tmp_path, gate), store=store, broker=broker) as it:

        def health() -> dict[str, Any]:
            return read_health(settings.king.health_file) or {}

        it.until(lambda: health().get("in_flight") == 2 and health().get("queue_depth") == 3)
        it.until(lambda: all(time.time() - tick < 2 for tick in health()["ticks"].values()))
        seen = health()
        assert seen["phase"] == "serving"
        assert seen["ticks"].keys() == {"main", "broker", "store", "dispatch"}
        assert seen["bundle"] == {"name": "fake", "version": "1"}
        assert seen["oldest_in_flight_s"] > 0
        assert seen["last_done_at"] is None
        assert [worker["role"] for worker in seen["workers"]] == ["extract"]
        gate.open.set()
        it.until(lambda: health()["posts_tagged"] == 5)
        seen = health()
        assert seen["counters"]["tagged"] == 5
        assert seen["posts_per_s"] > 0
        assert seen["last_done_at"] >= seen["last_delivery_at"] - 1
    assert health()["phase"] == "stopped"


def test_health_counts_files_that_the_cache_knows(tmp_path: Path) -> None:
    """Of the two files of a post one need not be decoded, the other is fetched."""

    def answer(task: Task) -> Answer:
        if isinstance(task, CacheLookup):
            return CacheHits((CacheHit(0, "ab", whole=True),))
        return default_answer(task)

    store = FakeStore(posts("p1", images=["http://a/1.jpg", "http://a/2.jpg"]))
    broker = MemoryBroker(queue_of(b"p1"))
    settings = king_settings(tmp_path).model_copy(update={"cache": CacheSettings(url="cache")})
    with Running(settings, fake_pool(tmp_path, answer), store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 1)
    seen = read_health(settings.king.health_file) or {}
    assert (seen["counters"]["cache_lookups"], seen["counters"]["cache_hits"]) == (2, 1)


def test_health_counts_videos_that_a_gpu_decodes_or_refuses(tmp_path: Path) -> None:
    """Of five videos a GPU decodes two, refuses one, and is not asked for the others."""
    by_gpu = [True, None, False, None, True]

    def answer(task: Task) -> Answer:
        decoded = default_answer(task)
        if isinstance(task, DecodeTask) and isinstance(decoded, Decoded):
            return msgspec.structs.replace(decoded, on_gpu=by_gpu.pop())
        return decoded

    store = FakeStore(posts("p1", videos=[f"http://a/{i}.mp4" for i in range(5)]))
    broker = MemoryBroker(queue_of(b"p1"))
    settings = king_settings(tmp_path)
    with Running(settings, fake_pool(tmp_path, answer), store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 1)
    seen = read_health(settings.king.health_file) or {}
    assert (seen["counters"]["gpu_decoded"], seen["counters"]["gpu_refused"]) == (2, 1)
