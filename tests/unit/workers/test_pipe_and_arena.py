"""What passes between King and worker: messages through the pipe, arrays through the slots."""

from __future__ import annotations

import os
import pickle
from typing import Any

import numpy as np
import pytest

from common.errors import FeatureError, MediaError
from common.post import Tag
from config.settings import Settings
from workers.pool.arena import Arena, create_arena
from workers.pool.launch import Launch
from workers.pool.pipe import MAX_FRAME, Pipe, PipeBroken, decode, encode
from workers.protocol import (
    ArrayRef,
    Decoded,
    Done,
    Extracted,
    Part,
    Ready,
    Tags,
)


def test_messages_arrive_as_they_were_sent(pipes: tuple[Pipe, Pipe]) -> None:
    """Values with arrays, of any layout, come out equal and in order."""
    one, other = pipes
    grid = np.arange(12, dtype=np.float16).reshape(3, 4)
    sent: list[Any] = [
        Ready({"a": "b"}),
        Done(1, Extracted(array=grid), 0.5),
        Done(2, Extracted(array=grid[:, ::2]), 0.5),
        Done(3, Tags("p", "m", "v", (Tag(1, "cat", float(np.float32(0.5))),), grid[0]), 0.1),
        Done(4, Decoded((Part("image", ArrayRef(0, 0, (1, 2, 2, 3), "uint8")),)), 0.1),
    ]
    for message in sent:
        one.send(message)
    got = other.receive_wait(5)
    assert [type(message) for message in got] == [type(message) for message in sent]
    assert np.array_equal(got[1].result.array, grid)
    assert np.array_equal(got[2].result.array, grid[:, ::2])
    assert got[3].result.tags == sent[3].result.tags
    assert got[4] == sent[4]
    assert other.receive_wait(0.01) == []


def test_sending_never_blocks_and_resumes(pipes: tuple[Pipe, Pipe]) -> None:
    """What the other side does not read waits here, and goes out piece by piece."""
    one, other = pipes
    big = "x" * 3_000_000
    one.send(Ready({"big": big}))
    assert one.unsent
    got: list[Any] = []
    while not got:
        got = other.receive()
        one.flush()
    assert got == [Ready({"big": big})]
    assert not one.unsent


def test_end_is_seen_after_the_last_message(pipes: tuple[Pipe, Pipe]) -> None:
    """What was sent before the end still arrives; sending to nobody is no error."""
    one, other = pipes
    one.send(Ready())
    one.close()
    assert other.receive_wait(5) == [Ready()]
    assert other.closed
    other.send(Ready())
    other.send_wait(Ready())
    assert not other.unsent


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/never",))


@pytest.mark.parametrize(
    "hostile",
    [
        pickle.dumps(Evil()),
        pickle.dumps(Settings()),
        pickle.dumps(os.getcwd),
        b"cworkers.protocol\nslot_bytes\n.",
        b"cworkers.protocol\nmath.prod\n.",
        b"cworkers.launch\nSettings\n.",
        b"cnumpy\nload\n.",
        b"no pickle",
        b"",
        pickle.dumps(Ready({"a": "b"}))[:-5],
    ],
)
def test_hostile_pickles_are_refused(hostile: bytes) -> None:
    """A frame may name messages and arrays, and nothing that could be called."""
    with pytest.raises(PipeBroken):
        decode(hostile)
    assert decode(encode(Ready())[8:]) == Ready()


def test_absurd_frame_is_refused(pipes: tuple[Pipe, Pipe]) -> None:
    """A length that no message has is not waited for."""
    one, other = pipes
    one._socket.send((MAX_FRAME + 1).to_bytes(8, "big"))
    with pytest.raises(PipeBroken, match="frame of"):
        other.receive_wait(5)


def test_what_a_decoder_writes_an_extractor_reads() -> None:
    """Two mappings of one memory file show the same array, without a copy, at its own slot."""
    fd = create_arena(4 * 8192)
    writing, reading = Arena.map(fd, 4, 8192), Arena.map(fd, 4, 8192)
    os.close(fd)
    writer = writing.writer(2)
    first = writer((3, 5), np.dtype(np.uint8))
    first[...] = 7
    second = writer((2, 96), np.dtype(np.float32))
    second[...] = 1.5
    refs = [writer.ref(first), writer.ref(second[:1])]
    assert [ref.offset for ref in refs] == [0, 64]
    assert refs[1].shape == (1, 96)
    views = [reading.view(ref) for ref in refs]
    assert (views[0] == 7).all()
    assert (views[1] == 1.5).all()
    first[0, 0] = 9
    assert views[0][0, 0] == 9
    with pytest.raises(ValueError, match="read-only"):
        views[0][...] = 0
    del views, first, second
    writing.close()
    reading.close()


def test_arrays_from_elsewhere_are_copied_in() -> None:
    """What does not lie whole, aligned and in order in the slot is copied there."""
    arena = Arena.private(1, 8192)
    writer = arena.writer(0)
    mine = writer((4, 6), np.dtype(np.uint8))
    mine[...] = np.arange(24).reshape(4, 6)
    for array in (mine[:, ::2], mine[1:], np.arange(6, dtype=np.float32)):
        ref = writer.ref(array)
        assert ref.offset % 64 == 0
        assert ref.offset > 0
        assert np.array_equal(arena.view(ref), array)
    del array, mine
    arena.close()


def test_slot_has_an_end() -> None:
    """Asking for more than a slot holds fails before a byte of the next slot is touched."""
    arena = Arena.private(2, 4096)
    writer = arena.writer(0)
    writer((4000,), np.dtype(np.uint8))
    with pytest.raises(MediaError, match="4096 bytes"):
        writer((100,), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="no slot 2"):
        arena.writer(2)
    with pytest.raises(ValueError, match="are not 3 slots"):
        Arena(arena._mapping, 3, 4096)


@pytest.mark.parametrize(
    "bad",
    [
        ArrayRef(2, 0, (1,), "uint8"),
        ArrayRef(-1, 0, (1,), "uint8"),
        ArrayRef(0, 64, (4096,), "uint8"),
        ArrayRef(0, -64, (1,), "uint8"),
        ArrayRef(0, 1, (1,), "float32"),
        ArrayRef(0, 0, (1 << 62, 4), "uint8"),
        ArrayRef(0, 0, (-1, -5), "uint8"),
        ArrayRef(0, 0, (1,), "object"),
    ],
)
def test_references_are_checked(bad: ArrayRef) -> None:
    """A reference from a decoder that was taken over reads nothing outside its slot."""
    arena = Arena.private(2, 4096)
    with pytest.raises(FeatureError, match="slot"):
        arena.view(bad)
    arena.close()


def test_memory_file_cannot_be_shrunk() -> None:
    """No worker can take the ground from under the others."""
    fd = create_arena(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    os.close(fd)


def test_launch_message_holds_no_code() -> None:
    """What a worker is told crosses the pipe like any other message."""
    launch = Launch(run="a:b", role="fetch", name="fetch-0", settings="{}")
    assert decode(encode(launch)[8:]) == launch
