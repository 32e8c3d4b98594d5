"""The small parts of the workers: pipe, arena, batches, spool, trust, pins, back-off, limits."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import ConfigError, FeatureError, FetchRetryable, MediaError
from config.settings import FeatureSettings, Settings
from extractors.post import Failure, Tag
from tests.workers.driving import decode_task, fetch_task, text_task
from tests.workers.web import web_server
from workers import decoder, fetcher
from workers.arena import Arena, create_arena
from workers.batch import DeviceLost, failure_of, run_batch
from workers.child import Context, Retire, serve, take_batch
from workers.launch import Launch, worker_specs
from workers.manifest import bundle_fingerprints, expected_fingerprints, mismatch
from workers.member import Member
from workers.pipe import MAX_FRAME, Pipe, PipeBroken, decode, encode
from workers.process import pinned_environment
from workers.protocol import (
    ArrayRef,
    Began,
    BundleLoaded,
    Decoded,
    DecodeTask,
    Done,
    Envelope,
    Expect,
    Extracted,
    ExtractTask,
    Failed,
    Fetched,
    Part,
    Ready,
    Refused,
    Stop,
    Tags,
    Task,
)
from workers.schedule import Scheduler
from workers.spool import Spool, file_name
from workers.trust import check_failure, check_message, check_result

# Pipe ----------------------------------------------------------------------------------------


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    one, other = (Pipe(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


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


# Arena ---------------------------------------------------------------------------------------


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


# Batches -------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


def test_out_of_memory_halves_until_it_fits() -> None:
    """A batch that does not fit is run in halves, in order; a member that never fits fails."""
    sizes: list[int] = []

    def run(items: Sequence[int]) -> list[Extracted]:
        sizes.append(len(items))
        if len(items) > 2 or 13 in items:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [Extracted(text=str(item)) for item in items]

    outcomes = run_batch("extract", run, list(range(8)))
    assert [o.text for o in outcomes if isinstance(o, Extracted)] == [str(i) for i in range(8)]
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    [failure] = run_batch("extract", run, [13])
    assert isinstance(failure, Failure)
    assert failure.retryable
    assert failure.type == "FeatureError"
    assert failure.message.startswith("OutOfMemoryError: out of memory: CUDA")


def test_members_run_alone_when_a_batch_raises() -> None:
    """Only the culprit fails, with its own reason; a wrong number of results is an error too."""

    def run(items: Sequence[int]) -> list[Extracted]:
        if 3 in items:
            raise FeatureError("three is wrong")
        return [Extracted(text=str(item)) for item in items]

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

    def run(items: Sequence[int]) -> list[Extracted]:
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


def test_batches_are_taken_by_lane_and_room() -> None:
    """The oldest task's lane is batched up to its limit; suspects run alone; order is kept."""
    rows = {"text": 2, "video": 8}
    tasks: list[Task] = [
        text_task("a"),
        fetch_task("f"),
        text_task("b"),
        text_task("c"),
        decode_task(),
    ]
    backlog = deque(Envelope(i, task, 9.0) for i, task in enumerate(tasks))
    backlog.append(Envelope(5, text_task("d"), 9.0, solo=True))
    batches = []
    while backlog:
        batches.append([envelope.task_id for envelope in take_batch(backlog, rows)])
    assert batches == [[0, 2], [1], [3], [4], [5]]


# The loop ------------------------------------------------------------------------------------


class Scripted:
    """A handler that remembers what it was asked."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.heard: list[object] = []
        self.closed = False

    def load(self) -> dict[str, str]:
        return {"loaded": "yes"}

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        texts = [task.text for task in tasks if isinstance(task, ExtractTask)]
        self.ran.append(texts)
        return [Extracted(text=text.upper()) for text in texts]

    def between(self, pipe: Pipe) -> float | None:
        if ["retire"] in self.ran:
            raise Retire
        return 5.0

    def told(self, message: object) -> None:
        self.heard.append(message)

    def close(self) -> None:
        self.closed = True


def context_of(pipe: Pipe, arena: Arena | None = None, **sections: Any) -> Context:
    launch = Launch(run="", role="extract", name="toy-0", settings="{}")
    return Context(pipe, launch, Settings.model_validate(sections), arena)


def test_loop_answers_in_order_and_stops(pipes: tuple[Pipe, Pipe]) -> None:
    """Ready, then Began and the answers of each batch; what is too late is not begun."""
    king, worker = pipes
    for i, text in enumerate(["a", "b"]):
        king.send(Envelope(i, text_task(text), time.monotonic() + 60))
    king.send(Envelope(2, text_task("late"), 0.0))
    king.send(Expect({"text": "fp"}))
    handler = Scripted()
    done = threading.Thread(target=serve, args=(context_of(worker), handler))
    done.start()
    said: list[Any] = []
    while len(said) < 5:
        said += king.receive_wait(60)
    assert said[0] == Ready({"loaded": "yes"})
    late = Failure("extract", "RetryableError", "waited past its deadline", retryable=True)
    assert said[1] == Failed(2, late)
    assert said[2] == Began((0, 1))
    assert [message.result.text for message in said[3:]] == ["A", "B"]
    king.send(Stop())
    done.join(60)
    assert (handler.ran, handler.heard) == ([["a", "b"]], [Expect({"text": "fp"})])
    assert handler.closed


def test_loop_ends_when_a_handler_retires_or_the_king_is_gone(pipes: tuple[Pipe, Pipe]) -> None:
    """Either way the loop returns, and the handler is closed."""
    king, worker = pipes
    king.send(Envelope(1, text_task("retire"), time.monotonic() + 60))
    handler = Scripted()
    serve(context_of(worker), handler)
    assert handler.ran == [["retire"]]
    assert handler.closed
    king.close()
    orphan = Scripted()
    serve(context_of(worker), orphan)
    assert orphan.closed


def test_decoder_out_of_memory_is_replaced(
    pipes: tuple[Pipe, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that needs too much memory fails with the key that bounds it; the process ends."""

    def run_decode(task: Any, *_: Any) -> Decoded:
        if task.path == "hungry":
            raise MemoryError
        raise MediaError("truncated")

    monkeypatch.setattr("workers.decoder.run_decode", run_decode)
    monkeypatch.setattr("workers.decoder.limit_memory", lambda megabytes: None)
    king, worker = pipes
    for i, path in enumerate(["broken", "hungry"]):
        king.send(Envelope(i, DecodeTask("image", path, 0), time.monotonic() + 60))
    decoder.run(context_of(worker, Arena.private(1, 4096), decode={"memory_mb": 7}))
    failures = [m.failure.message for m in king.receive_wait(5) if isinstance(m, Failed)]
    assert failures == ["truncated", "needs more memory than decode.memory_mb (7)"]
    with pytest.raises(ConfigError, match="needs the slots"):
        decoder.run(context_of(worker))


def test_downloader_answers_through_one_pipe(pipes: tuple[Pipe, Pipe], tmp_path: Path) -> None:
    """Downloads run at once in threads; each says that it began, and how it ended."""
    king, worker = pipes
    fetch = {"allow_private_hosts": True, "connections": 3}
    context = context_of(worker, fetch=fetch)
    context = replace(context, launch=replace(context.launch, spool=str(tmp_path)))
    with web_server() as web:
        for i, path in enumerate(["/ok", "/status/404", "/ok"]):
            king.send(Envelope(i, fetch_task(web.url(path)), time.monotonic() + 60))
        king.send(Envelope(3, fetch_task(web.url("/ok")), 0.0))
        thread = threading.Thread(target=fetcher.run, args=(context,))
        thread.start()
        said: list[Any] = []
        while sum(isinstance(message, (Done, Failed)) for message in said) < 4:
            said += king.receive_wait(60)
        king.send(Stop())
        thread.join(60)
    assert said[0] == Ready()
    ended = {m.task_id: m for m in said if isinstance(m, (Done, Failed))}
    assert [type(ended[i]).__name__ for i in range(4)] == ["Done", "Failed", "Done", "Failed"]
    assert {m.task_ids for m in said if isinstance(m, Began)} == {(0,), (1,), (2,)}
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["0", "2"]
    with pytest.raises(ConfigError, match=r"fetch\.spool"):
        fetcher.run(context_of(worker))


# Spool ---------------------------------------------------------------------------------------


def test_spool_is_private_and_ends_with_its_king(tmp_path: Path) -> None:
    """A folder of its own with mode 0700; other living Kings' folders stay, dead ones go."""
    root = tmp_path / "spool"
    first = Spool(root)
    assert first.folder.stat().st_mode & 0o777 == 0o700
    (first.folder / "file").write_text("x")
    second = Spool(root)
    assert (first.folder / "file").exists(), "a living King lost its files"
    first._lock.close()  # as the kernel does when its process ends
    (root / "king-not-a-folder").write_text("x")
    third = Spool(root)
    assert not first.folder.exists()
    assert second.folder.exists()
    for spool in (second, third):
        spool.close()
        assert not spool.folder.exists()


def test_spool_removes_what_a_dead_downloader_left(tmp_path: Path) -> None:
    """Files of given tasks go, others stay; only files of the spool can be removed."""
    spool = Spool(tmp_path)
    kept = spool.folder / file_name(12)
    left = spool.folder / file_name(1)
    outside = tmp_path / "outside"
    for path in (kept, left, outside):
        path.write_text("x")
    spool.remove_of([1, 2])
    assert (kept.exists(), left.exists()) == (True, False)
    spool.remove(str(outside))
    assert outside.exists()
    spool.remove(str(kept))
    assert not kept.exists()
    assert file_name(1) != file_name(1)
    spool.close()


# Trust ---------------------------------------------------------------------------------------


def entry_of(task: Any, slot: int | None = None) -> Any:
    scheduler = Scheduler(Settings())
    entry = scheduler._entries[scheduler.submit(task, 9.0)]
    entry.slot = slot
    return entry


def test_what_is_believed(tmp_path: Path) -> None:
    """Results of the right kind, in the right place, pass."""
    check_result(entry_of(fetch_task("u")), Fetched(str(tmp_path / "f"), 1), tmp_path)
    part = Part("image", ArrayRef(3, 0, (1, 2, 2, 3), "uint8"))
    check_result(entry_of(decode_task(), 3), Decoded((part,)), tmp_path)
    check_result(entry_of(text_task("t")), Extracted(text="x"), tmp_path)
    check_failure(Failure("decode", "MediaError", "broken"))


@pytest.mark.parametrize(
    ("task", "result"),
    [
        (fetch_task("u"), Fetched("/etc/passwd", 1)),
        (fetch_task("u"), Extracted()),
        (text_task("t"), Fetched("/spool/f", 1)),
        (decode_task(), Decoded((Part("image", ArrayRef(4, 0, (1,), "uint8")),))),
        (decode_task(), Decoded((Part("image", ArrayRef(3, -1, (1,), "uint8")),))),
        (decode_task(), Decoded((Part("image", ArrayRef(3, 0, (-1,), "uint8")),))),
        (decode_task(), Decoded((Part("other", ArrayRef(3, 0, (1,), "uint8")),))),  # type: ignore[arg-type]
        (decode_task(), Decoded(("part",))),  # type: ignore[arg-type]
        (decode_task(), Decoded((), {"smell": Failure("a", "b", "c")})),  # type: ignore[dict-item]
        (decode_task(), Decoded((), {"audio": "no"})),  # type: ignore[dict-item]
        (decode_task(), Decoded((), 5)),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_believed(task: Any, result: Any) -> None:
    """An answer that cannot be true marks its worker as broken."""
    with pytest.raises(PipeBroken):
        check_result(entry_of(task, 3), result, Path("/spool"))


@pytest.mark.parametrize(
    "message",
    [
        Began((1, [])),  # type: ignore[arg-type]
        Began(5),  # type: ignore[arg-type]
        Done([], Extracted(), 0.1),  # type: ignore[arg-type]
        Done(1, Extracted(), "long"),  # type: ignore[arg-type]
        Failed(1, "no"),  # type: ignore[arg-type]
        Failed("1", Failure("a", "b", "c")),  # type: ignore[arg-type]
        Ready({"a": 1}),  # type: ignore[dict-item]
        Ready([]),  # type: ignore[arg-type]
        Refused(b"no"),  # type: ignore[arg-type]
        BundleLoaded("name", 2),  # type: ignore[arg-type]
        Stop(),
        ArrayRef(0, 0, (), "uint8"),
    ],
)
def test_messages_of_wrong_types_are_not_believed(message: Any) -> None:
    """A field of another type would break the King where it is read."""
    with pytest.raises(PipeBroken):
        check_message(message)


def test_messages_of_right_types_are_believed() -> None:
    """What honest workers say passes."""
    failure = Failure("a", "b", "c")
    done = Done(1, Extracted(text="x"), 0.5)
    for message in (Ready(), Ready({"a": "b"}), Began((1, 2)), done, Failed(1, failure)):
        check_message(message)
    for last in (Refused("no"), BundleLoaded("name", "1")):
        check_message(last)


def test_a_failure_must_be_one() -> None:
    """A failure with something else in it would break the King where it is read."""
    for failure in ("no", Failure("a", "b", 5)):  # type: ignore[arg-type]
        with pytest.raises(PipeBroken):
            check_failure(failure)  # type: ignore[arg-type]


# Pins, specs, back-off -----------------------------------------------------------------------


def test_workers_of_the_settings() -> None:
    """One downloader, N decoders, each placement's processes with its lanes, one fusion."""
    settings = Settings.model_validate(
        {
            "decode": {"processes": 3, "deadline_s": 7},
            "fetch": {"connections": 5},
            "features": {"ocr": {"enabled": False}},
            "workers": {
                "task_timeout_s": 9,
                "extractors": [
                    {"device": "cuda:1", "extractors": ["video", "image"], "processes": 2},
                    {"extractors": ["audio", "text", "ocr"], "threads": 4},
                ],
            },
        }
    )
    specs = {spec.name: spec for spec in worker_specs(settings)}
    assert list(specs) == [
        "fetch-0",
        *("decode-0", "decode-1", "decode-2"),
        *("extract-0", "extract-1", "extract-2"),
        "fuse-0",
    ]
    assert (specs["fetch-0"].at_most, specs["decode-0"].at_most) == (5, 1)
    assert (specs["decode-0"].limit_s, specs["extract-0"].limit_s) == (7, 9)
    assert specs["extract-1"].lanes == ("video", "image")
    assert specs["extract-2"].lanes == ("audio", "text"), "OCR is disabled"


def test_devices_are_pinned_before_birth() -> None:
    """A worker sees its one device and no other; the King's own restriction is kept."""
    spec = worker_specs(Settings())[0]
    cpu = pinned_environment(replace(spec, threads=3), {"PATH": "/bin", "PYTHONPATH": "/x"})
    assert cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert {cpu[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"3"}
    assert cpu["PATH"] == "/bin"
    assert cpu["PYTHONPATH"].endswith(":/x")
    gpu = replace(spec, device="cuda:1")
    assert pinned_environment(gpu, {})["CUDA_VISIBLE_DEVICES"] == "1"
    assert pinned_environment(gpu, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"


def test_back_off_grows_has_a_cap_and_forgets() -> None:
    """Deaths in a row wait longer, up to a cap; a task answered in between starts anew."""
    member = Member(worker_specs(Settings())[0])
    delays = [member.died(0.0, answered=0, planned=False) for _ in range(12)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert delays[-1] == 30.0
    assert member.died(0.0, answered=5, planned=False) == 0.1
    assert member.deaths == 13
    assert member.died(0.0, answered=5, planned=True) == 0.0
    assert member.deaths == 13


# Bundle and extractors -----------------------------------------------------------------------


def test_bundle_is_held_against_the_extractors() -> None:
    """Every modality of the bundle must be made as in training; more than it needs is fine."""
    infos = [{"fingerprints": '{"video": "v1", "image": "i1"}'}, {"fingerprints": '{"text": "t"}'}]
    features = FeatureSettings.model_validate({"ocr": {"enabled": False}})
    expected = expected_fingerprints(features, infos)
    assert expected["video"] == "v1"
    assert expected["text"] == "t"
    assert mismatch({"video": "v1"}, expected) is None
    wrong = mismatch({"video": "v1", "image": "i2"}, expected)
    assert wrong == "modality image: the bundle needs i2, the extractors give i1"
    assert "not enabled" in str(mismatch({"audio": "a"}, expected))
    assert bundle_fingerprints({}) == {}
    assert expected_fingerprints(features, []) == {}


def test_workers_that_disagree_are_refused() -> None:
    """The same extractor must give the same features on every worker."""
    infos = [{"fingerprints": '{"text": "one"}'}, {"fingerprints": '{"text": "two"}'}]
    with pytest.raises(ConfigError, match="extractor text differs between workers: one and two"):
        expected_fingerprints(FeatureSettings(), infos)


# A decoder's memory --------------------------------------------------------------------------

LIMITED = """
import mmap
import numpy as np
from workers.decoder import limit_memory
limit_memory(64)
shared = mmap.mmap(-1, 256 << 20)  # the slots are shared, and do not count
small = np.ones(16 << 20, np.uint8)
try:
    np.ones(128 << 20, np.uint8)
except MemoryError:
    print("limited")
"""


def test_memory_limit_counts_private_growth() -> None:
    """Past the limit an allocation fails in the decoder alone; shared slots do not count."""
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert ran.stdout == "limited\n"


def test_launch_message_holds_no_code() -> None:
    """What a worker is told crosses the pipe like any other message."""
    launch = Launch(run="a:b", role="fetch", name="fetch-0", settings="{}")
    assert decode(encode(launch)[8:]) == launch
