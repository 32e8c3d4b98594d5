"""Messages between King and worker: what crosses, and what the King refuses."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.post import Failure, Features, Media, Tag, Tags
from tests.support.workers.driving import decode_task, fetch_task, fuse_task, text_task
from tests.support.workers.fixtures import Ends
from tests.support.workers.malformed import MALFORMED
from workers.pool.channel import MAX_FRAME, Channel, encode, to_king, to_worker
from workers.protocol import (
    ArrayRef,
    Began,
    BundleLoaded,
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    CacheUpdate,
    Decoded,
    Done,
    Envelope,
    Expect,
    Extracted,
    ExtractTask,
    Failed,
    Fetched,
    FuseTask,
    Launch,
    Part,
    ProtocolError,
    Ready,
    Refused,
    Reply,
    Stop,
    Task,
    validate_reply,
)

FAILURE = Failure("decode", "MediaError", "broken")
PICTURE = Part("image", ArrayRef(3, 0, (1, 2, 2, 3), "uint8"))


def test_arrays_arrive_as_they_were_sent(ends: Ends) -> None:
    """Arrays of any layout come out equal and in order, of the dtype of their field."""
    king, worker = ends
    grid = np.arange(12, dtype=np.float16).reshape(3, 4)
    empty = np.empty((0, 4), np.float16)
    scores = np.ones(3)
    tag = Tag(1, "cat", np.float64(0.1))
    for array in (grid, grid[:, ::2], empty):
        worker.send(Done(1, Extracted(array=array, also={"video_lstm": array})))
    worker.send(Done(2, Tags("p", "m", "v", (tag,), scores)))
    first, second, third, fused = king.receive_wait(5)
    for done, sent in ((first, grid), (second, grid[:, ::2]), (third, empty)):
        assert isinstance(done, Done)
        assert isinstance(done.result, Extracted)
        for received in (done.result.array, done.result.also["video_lstm"]):
            assert received is not None
            np.testing.assert_array_equal(received, sent, strict=True)
    assert isinstance(fused, Done)
    assert isinstance(fused.result, Tags)
    assert fused.result.tags == (tag,)
    np.testing.assert_array_equal(fused.result.scores, scores, strict=True)
    king.send(Envelope(1, FuseTask(Features("p", {"video": grid}, {"video": "ok"})), 9.0))
    [envelope] = worker.receive_wait(5)
    assert isinstance(envelope, Envelope)
    assert isinstance(envelope.task, FuseTask)
    np.testing.assert_array_equal(envelope.task.features.arrays["video"], grid, strict=True)
    assert king.receive_wait(0.01) == []


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (Ready({"a": "b"}), to_king),
        (Began((1, 2)), to_king),
        (Done(4, Decoded((PICTURE,), {"audio": FAILURE})), to_king),
        (Done(5, CacheHits((CacheHit(0, "ab", True, frozenset(["frames"])),))), to_king),
        (Failed(1, FAILURE), to_king),
        (Refused("no"), to_king),
        (BundleLoaded("name", "1"), to_king),
        (Launch(run="a:b", role="fetch", name="fetch-0", settings="{}"), to_worker),
        (Envelope(1, decode_task(), 9.0, solo=True), to_worker),
        (Envelope(1, ExtractTask("video", "video", (PICTURE.ref,), kind="image"), 9.0), to_worker),
        (
            Envelope(1, CacheLookup((CacheQuery(0, Media("image", "u"), ("image",)),)), 9.0),
            to_worker,
        ),
        (Expect('{"text": "fp"}'), to_worker),
        (CacheUpdate("ab", parts=("frames",), failure=FAILURE), to_worker),
        (Stop(), to_worker),
    ],
)
def test_messages_arrive_as_they_were_sent(message: Any, decode: Callable[[Any], object]) -> None:
    body = encode(message)[8:]
    assert decode(body) == message
    with pytest.raises(ProtocolError):
        (to_worker if decode is to_king else to_king)(body)


def test_texts_that_utf8_cannot_write_still_cross(ends: Ends) -> None:
    """Half a surrogate pair, as JSON can write it, arrives as a question mark and stops nobody."""
    king, worker = ends
    king.send(Envelope(1, text_task("a\ud800b"), 9.0))
    assert worker.receive_wait(5) == [Envelope(1, text_task("a?b"), 9.0)]


def test_sending_never_blocks_and_resumes(ends: Ends) -> None:
    king, worker = ends
    big = "x" * 3_000_000
    worker.send(Ready({"big": big}))
    assert worker.unsent
    messages: list[Reply] = []
    while not messages:
        messages = king.receive()
        worker.flush()
    assert messages == [Ready({"big": big})]
    assert not worker.unsent


def test_end_is_seen_after_the_last_message(ends: Ends) -> None:
    king, worker = ends
    king.send(Stop())
    king.close()
    assert worker.receive_wait(5) == [Stop()]
    assert worker.closed
    worker.send(Ready())
    worker.send_wait(Ready())
    assert not worker.unsent


@pytest.mark.parametrize(("body", "reason"), MALFORMED)
def test_what_is_no_message_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=f"(?i){reason}"):
        to_king(body)


def test_absurd_frame_is_refused() -> None:
    ours, theirs = socket.socketpair()
    king = Channel(ours, to_king)
    with theirs:
        theirs.send((MAX_FRAME + 1).to_bytes(8, "big"))
        with pytest.raises(ProtocolError, match="a frame of"):
            king.receive_wait(5)
    king.close()


SPOOL = Path("/spool")


@pytest.mark.parametrize(
    ("task", "result", "reason"),
    [
        (fetch_task("u"), Fetched("/spool/f", 1), None),
        (decode_task(), Decoded((PICTURE,)), None),
        (text_task("t"), Extracted(text="x"), None),
        (fetch_task("u"), Fetched("/etc/passwd", 1), "`path` '/etc/passwd' is not in /spool"),
        (fetch_task("u"), Extracted(), "`result` is Extracted, not Fetched"),
        (text_task("t"), Fetched("/spool/f", 1), "`result` is Fetched, not Extracted"),
        (fuse_task("t"), Decoded(()), "`result` is Decoded, not Tags"),
        (
            decode_task(),
            Decoded((PICTURE, Part("image", ArrayRef(4, 0, (1,), "uint8")))),
            r"`parts\[1\].ref.slot` is 4, not 3",
        ),
    ],
)
def test_an_answer_must_be_of_its_task(task: Task, result: Any, reason: str | None) -> None:
    reply = Done(7, result)
    if reason is None:
        validate_reply(reply, task, 3, SPOOL)
        return
    with pytest.raises(ProtocolError, match=f"task 7: {reason}"):
        validate_reply(reply, task, 3, SPOOL)
