"""A worker's batches and its loop."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import ConfigError, FeatureError, FetchRetryable, MediaError
from common.fingerprint import packed
from common.post import Failure
from config.settings import Settings
from extractors.media import hwaccel
from tests.support import media
from tests.support.services import RedisServer
from tests.support.workers.driving import decode_task, fetch_task, text_task
from tests.support.workers.fixtures import Ends
from tests.support.workers.web import web_server
from workers import protocol
from workers.pool.channel import Arena, Channel
from workers.roles import batched, loop
from workers.roles.loop import (
    Context,
    DeviceLost,
    Handler,
    Retire,
    failure_of,
    run_batch,
    serve,
    take_batch,
)


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def test_out_of_memory_halves_until_it_fits() -> None:
    sizes: list[int] = []

    def run(items: Sequence[int]) -> list[protocol.Extracted]:
        sizes.append(len(items))
        if len(items) > 2 or 13 in items:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [protocol.Extracted(text=str(item)) for item in items]

    outcomes = run_batch("extract", run, list(range(8)))
    assert [o.text for o in outcomes if isinstance(o, protocol.Extracted)] == [
        str(i) for i in range(8)
    ]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    [failure] = run_batch("extract", run, [13])
    assert isinstance(failure, Failure)
    assert failure.retryable
    assert failure.type == "FeatureError"
    assert failure.message.startswith("OutOfMemoryError: out of memory: CUDA")


def test_members_run_alone_when_a_batch_raises() -> None:
    def run(items: Sequence[int]) -> list[protocol.Extracted]:
        if 3 in items:
            raise FeatureError("three is wrong")
        return [protocol.Extracted(text=str(item)) for item in items]

    outcomes = run_batch("extract", run, [1, 3, 5])
    assert [type(o).__name__ for o in outcomes] == ["Extracted", "Failure", "Extracted"]
    [failure] = run_batch("extract", lambda items: [], [1])
    assert isinstance(failure, Failure)
    assert failure.message == "RuntimeError: extract: 0 results for 1 items"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_lost_device_ends_the_process(message: str) -> None:
    """After a device-side assert nothing else in the process can succeed: it is not tried."""
    calls = []

    def run(items: Sequence[int]) -> list[protocol.Extracted]:
        calls.append(len(items))
        raise RuntimeError(message)

    with pytest.raises(DeviceLost, match="CUDA error"):
        run_batch("extract", run, [1, 2, 3])
    assert calls == [3]


def test_failures_know_whether_to_come_back() -> None:
    """Ours by their class; a foreign exception is permanent, typed by its stage, in one line."""
    assert failure_of("fetch", FetchRetryable("slow")).retryable
    assert not failure_of("decode", MediaError("broken")).retryable
    foreign = failure_of("extract", ValueError("two\nlines"))
    assert (foreign.type, foreign.retryable) == ("FeatureError", False)
    assert foreign.message == "ValueError: two lines"
    nameless = failure_of("decode", KeyError())
    assert (nameless.type, nameless.message) == ("MediaError", "KeyError")


def test_batches_are_taken_by_queue_and_room() -> None:
    """The oldest task's queue is batched up to its limit; suspects run alone; order is kept."""
    rows = {"text": 2, "video": 8}
    tasks: list[protocol.Task] = [
        text_task("a"),
        fetch_task("f"),
        text_task("b"),
        text_task("c"),
        decode_task(),
    ]
    backlog = deque(protocol.Envelope(i, task, 9.0) for i, task in enumerate(tasks))
    backlog.append(protocol.Envelope(5, text_task("d"), 9.0, solo=True))
    batches = []
    while backlog:
        batches.append([envelope.task_id for envelope in take_batch(backlog, rows)])
    assert batches == [[0, 2], [1], [3], [4], [5]]


class Scripted(Handler):
    """A handler that remembers what it was asked."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.heard: list[object] = []
        self.closed = False

    def load(self) -> dict[str, str]:
        return {"loaded": "yes"}

    def run(self, tasks: Sequence[protocol.Task]) -> list[Any]:
        texts = [task.text for task in tasks if isinstance(task, protocol.ExtractTask)]
        self.ran.append(texts)
        return [protocol.Extracted(text=text.upper()) for text in texts]

    def between_batches(self, channel: Channel[protocol.Command]) -> float | None:
        if ["retire"] in self.ran:
            raise Retire
        return 5.0

    def control(self, message: protocol.Command) -> None:
        self.heard.append(message)

    def close(self) -> None:
        self.closed = True


def context_of(
    channel: Channel[protocol.Command], arena: Arena | None = None, **sections: Any
) -> Context:
    launch = protocol.Launch(run="", role="extract", name="toy-0", settings="{}")
    return Context(channel, launch, Settings.model_validate(sections), arena)


def test_loop_answers_in_order_and_stops(ends: Ends) -> None:
    king, worker = ends
    for i, text in enumerate(["a", "b"]):
        king.send(protocol.Envelope(i, text_task(text), time.monotonic() + 60))
    king.send(protocol.Envelope(2, text_task("late"), 0.0))
    king.send(protocol.Expect("{}"))
    handler = Scripted()
    done = threading.Thread(target=serve, args=(context_of(worker), handler))
    done.start()
    said: list[Any] = []
    while len(said) < 5:
        said += king.receive_wait(60)
    assert said[0] == protocol.Ready({"loaded": "yes"})
    late = Failure("extract", "RetryableError", "waited past its deadline", retryable=True)
    assert said[1] == protocol.Failed(2, late)
    assert said[2] == protocol.Began((0, 1))
    assert [message.result.text for message in said[3:]] == ["A", "B"]
    king.send(protocol.Stop())
    done.join(60)
    assert (handler.ran, handler.heard) == ([["a", "b"]], [protocol.Expect("{}")])
    assert handler.closed


def test_loop_ends_when_a_handler_retires_or_the_king_is_gone(ends: Ends) -> None:
    """Either way the loop returns, and the handler is closed."""
    king, worker = ends
    king.send(protocol.Envelope(1, text_task("retire"), time.monotonic() + 60))
    handler = Scripted()
    serve(context_of(worker), handler)
    assert handler.ran == [["retire"]]
    assert handler.closed
    king.close()
    orphan = Scripted()
    serve(context_of(worker), orphan)
    assert orphan.closed


def test_decoder_out_of_memory_is_replaced(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that needs too much memory fails with the key that bounds it; the process ends."""

    def run_decode(task: Any, *_: Any) -> protocol.Decoded:
        if task.path == "hungry":
            raise MemoryError
        raise MediaError("truncated")

    monkeypatch.setattr("workers.roles.batched.run_decode", run_decode)
    monkeypatch.setattr("workers.roles.batched.limit_memory", lambda megabytes: None)
    king, worker = ends
    for i, path in enumerate(["broken", "hungry"]):
        king.send(
            protocol.Envelope(i, protocol.DecodeTask("image", path, 0), time.monotonic() + 60)
        )
    batched.decode(context_of(worker, Arena.private(1, 4096), decode={"memory_mb": 7}))
    failures = [m.failure.message for m in king.receive_wait(5) if isinstance(m, protocol.Failed)]
    assert failures == ["truncated", "needs more memory than decode.memory_mb (7)"]
    with pytest.raises(ConfigError, match="passed no slots"):
        batched.decode(context_of(worker))


def test_decoder_opens_the_gpu_before_its_memory_is_limited(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory that CUDA takes is no file's; without a GPU the file is decoded, and that is said."""
    order: list[str] = []
    monkeypatch.setattr(hwaccel, "LEAST_PIXELS", 0)
    monkeypatch.setattr(hwaccel, "LEAST_FRAMES", 0)
    monkeypatch.setattr(hwaccel, "gpu_decoder", lambda pid: order.append("gpu"))
    monkeypatch.setattr(batched, "limit_memory", lambda megabytes: order.append("limit"))
    path = media.write_video(tmp_path / "a.mp4", media.grey_steps(50), 25, gop=50)
    king, worker = ends
    task = protocol.DecodeTask("video", str(path), 0)
    king.send(protocol.Envelope(1, task, time.monotonic() + 60))
    sections: dict[str, Any] = {"decode": {"hwaccel": "cuda"}, "workers": {"recycle_tasks": 1}}
    batched.decode(context_of(worker, Arena.private(1, 1 << 24), **sections))
    assert order == ["gpu", "limit", "gpu"]
    [done] = [m for m in king.receive_wait(5) if isinstance(m, protocol.Done)]
    assert isinstance(done.result, protocol.Decoded)
    assert done.result.on_gpu is False
    assert done.result.parts[0].kind == "frames"


def test_downloader_answers_through_one_channel(ends: Ends, tmp_path: Path) -> None:
    """Downloads run at once in threads; each says how it ended."""
    king, worker = ends
    context = context_of(worker, fetch={"allow_private_hosts": True, "connections": 3})
    context = replace(context, launch=msgspec.structs.replace(context.launch, spool=str(tmp_path)))
    with web_server() as web:
        for i, path in enumerate(["/ok", "/status/404", "/ok"]):
            king.send(protocol.Envelope(i, fetch_task(web.url(path)), time.monotonic() + 60))
        king.send(protocol.Envelope(3, fetch_task(web.url("/ok")), 0.0))
        thread = threading.Thread(target=loop.fetch, args=(context,))
        thread.start()
        said: list[Any] = []
        while sum(isinstance(message, (protocol.Done, protocol.Failed)) for message in said) < 4:
            said += king.receive_wait(60)
        king.send(protocol.Stop())
        thread.join(60)
    assert said[0] == protocol.Ready()
    ended = {m.task_id: m for m in said if isinstance(m, (protocol.Done, protocol.Failed))}
    assert [type(ended[i]).__name__ for i in range(4)] == ["Done", "Failed", "Done", "Failed"]
    assert not any(isinstance(message, protocol.Began) for message in said)  # it begins all at once
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["0", "2"]
    with pytest.raises(ConfigError, match=r"fetch\.spool"):
        loop.fetch(context_of(worker))


def test_cache_that_hangs(ends: Ends, tmp_path: Path) -> None:
    """A Redis that has stopped costs a time-out once, and then nothing until it is tried again."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    king, worker = ends
    cache = {"url": server.url, "timeout_s": 0.5, "retry_s": 120}
    thread = threading.Thread(target=loop.lookup, args=(context_of(worker, cache=cache),))
    thread.start()
    said: list[Any] = []

    def ask(task_id: int) -> None:
        task = protocol.CacheLookup((), frozenset({"text"}), "a cat")
        king.send(protocol.Envelope(task_id, task, time.monotonic() + 60))
        while not any(
            isinstance(message, protocol.Done) and message.task_id == task_id for message in said
        ):
            said.extend(king.receive_wait(60))

    try:
        king.send(protocol.Expect(packed({"text": "f"})))
        ask(0)
        server.pause()
        started = time.monotonic()
        for task_id in range(1, 20):
            ask(task_id)
        assert 0.5 <= time.monotonic() - started < 8, "once for each look-up is 10 s and more"
        assert all(m.result == protocol.CacheHits() for m in said if isinstance(m, protocol.Done))
        king.send(protocol.Stop())
    finally:
        server.resume()
        thread.join(60)
        server.close()
