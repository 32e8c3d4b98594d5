"""A worker pool in memory: `FakePool` keeps the promises of `workers.protocol.TaskPool`.

Tasks are answered inside `poll`, in order of priority and age, by a function that the test gives;
slots are counted by the real `SlotTable`, downloads are real files.
"""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from common.post import Failure, MediaKind, Stream, Tag, Tags
from extractors.parts import PartKind
from workers import protocol
from workers.pool.channel import SlotTable

Answer: TypeAlias = protocol.Result | Failure | None
"""A result, a failure, or None for a task that never ends."""

_PART_OF: dict[MediaKind, PartKind] = {"audio": "sound", "video": "frames", "image": "image"}

DIED = Failure("extract", "WorkerDied", "worker fake-0 died (signal 9)", retryable=True)


@dataclass
class _Task:
    task_id: int
    task: protocol.Task
    deadline: float
    order: tuple[int, int, int]
    due: float


class FakePool:
    """One worker that does one task after another.

    Args:
        answer: Task ─► what becomes of it; None takes `default_answer`.
        spool: Where "downloads" are written.
        latency_s: How long each task takes.
        ready_after_s: How long "loading" takes.
    """

    def __init__(
        self,
        spool: Path,
        answer: Callable[[protocol.Task], Answer] | None = None,
        *,
        slots: int = 4,
        latency_s: float = 0.0,
        ready_after_s: float = 0.0,
        refuse: str | None = None,
        bundle: tuple[str, str] = ("fake", "1"),
    ) -> None:
        self.bundle: tuple[str, str] | None = None
        self.ready = False
        self.refused: str | None = None
        self.fingerprints: dict[Stream, str] = {}
        self.slots = SlotTable(slots)
        self.submitted: list[protocol.Task] = []
        self.stopped = False
        self._spool = spool
        self._answer = answer or default_answer
        self._latency_s = latency_s
        self._ready_at = ready_after_s
        self._refuse = refuse
        self._bundle = bundle
        self._queue: list[_Task] = []
        self._running: list[_Task] = []
        self._events: list[protocol.PoolEvent] = []
        self._ids = itertools.count(1)
        self._woken = threading.Event()
        self._done = 0

    @property
    def workers(self) -> list[protocol.WorkerView]:
        held = len(self._running)
        return [
            protocol.WorkerView(
                "fake-0", "extract", "cpu", (), "ready", None, held, self._done, self._done, 0
            )
        ]

    def start(self) -> None:
        self._ready_at += time.monotonic()

    def submit(
        self, task: protocol.Task, *, deadline: float, priority: int = 0, turn: int = 0
    ) -> int:
        if isinstance(task, protocol.ExtractTask):
            for slot in {ref.slot for ref in task.refs}:
                self.slots.retain(slot)
        self.submitted.append(task)
        task_id = next(self._ids)
        self._queue.append(_Task(task_id, task, deadline, (-priority, turn, task_id), 0.0))
        self._queue.sort(key=lambda entry: entry.order)
        return task_id

    def cancel(self, task_id: int) -> None:
        """Forget a task; free what it holds."""
        for entries in (self._queue, self._running):
            for entry in [e for e in entries if e.task_id == task_id]:
                entries.remove(entry)
                self._free(entry, keeps_slot=False)

    def release(self, slot: int) -> None:
        """No more tasks refer to the slot."""
        self.slots.release(slot)

    def poll(self, timeout_s: float) -> list[protocol.PoolEvent]:
        """Work until there is an event, the time is up, or `wake`."""
        end = time.monotonic() + timeout_s
        while True:
            self._work()
            if self._events or self._woken.is_set() or time.monotonic() >= end:
                break
            self._woken.wait(min(0.002 if self._running else 0.01, timeout_s))
        self._woken.clear()
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        del timeout_s
        self.stopped = True
        for entry in [*self._queue, *self._running]:
            self.cancel(entry.task_id)

    def swap_bundle(self, name: str, version: str, **more: Any) -> None:
        """Serve another bundle; ``more`` are further fields of `BundleLoaded`."""
        self.bundle = self._bundle = (name, version)
        self._events.append(protocol.BundleLoaded(name, version, **more))

    def refuse(self, message: str) -> None:
        """Give up, after having worked."""
        self.refused = message
        self._events.append(protocol.PoolRefused(message))

    def _work(self) -> None:
        now = time.monotonic()
        if self._refuse is not None and self.refused is None:
            self.refused = self._refuse
            self._events.append(protocol.PoolRefused(self._refuse))
        if not self.ready:
            if self._refuse is not None or now < self._ready_at:
                return
            self.ready, self.bundle = True, self._bundle
            self._events.append(protocol.PoolReady())
        for entry in [e for e in self._running if e.due <= now]:
            answer = self._answer(entry.task)
            if answer is None:
                if entry.deadline <= now:
                    self._end(entry, replace(DIED, message="ran past its deadline"))
                continue
            self._end(entry, answer)
        for entry in list(self._queue):
            if isinstance(entry.task, protocol.DecodeTask):
                slot = self.slots.acquire()
                if slot is None:
                    continue  # the extraction tasks behind it will free one
                entry.task = msgspec.structs.replace(entry.task, slot=slot)
            self._queue.remove(entry)
            entry.due = now + self._latency_s
            self._running.append(entry)

    def _end(self, entry: _Task, answer: protocol.Result | Failure) -> None:
        self._running.remove(entry)
        self._done += 1
        if isinstance(entry.task, protocol.FetchTask) and isinstance(answer, protocol.Fetched):
            path = self._spool / f"{entry.task_id}.bin"
            path.write_bytes(b"media")
            answer = protocol.Fetched(str(path), 5)
        if isinstance(entry.task, protocol.DecodeTask) and isinstance(answer, protocol.Decoded):
            if not Path(entry.task.path).exists():
                answer = Failure("decode", "MediaError", "the file is gone")
            else:
                parts = [
                    protocol.Part(p.kind, msgspec.structs.replace(p.ref, slot=entry.task.slot))
                    for p in answer.parts
                ]
                answer = msgspec.structs.replace(answer, parts=tuple(parts))
        self._free(entry, keeps_slot=isinstance(answer, protocol.Decoded) and bool(answer.parts))
        if isinstance(answer, Failure):
            self._events.append(protocol.Failed(entry.task_id, answer))
        else:
            self._events.append(protocol.Done(entry.task_id, answer))

    def _free(self, entry: _Task, *, keeps_slot: bool) -> None:
        if isinstance(entry.task, protocol.ExtractTask):
            for slot in {ref.slot for ref in entry.task.refs}:
                self.slots.drop(slot)
        elif isinstance(entry.task, protocol.DecodeTask) and entry.task.slot >= 0:
            if keeps_slot:
                self.slots.hand_over(entry.task.slot)
            else:
                self.slots.abandon(entry.task.slot)


def default_answer(task: protocol.Task) -> Answer:
    """Everything goes well: one picture for OCR in each media file, one tag for each post."""
    if isinstance(task, protocol.FetchTask):
        return protocol.Fetched("", 0)
    if isinstance(task, protocol.DecodeTask):
        return decoded(_PART_OF[task.kind])
    if isinstance(task, protocol.ExtractTask):
        if task.extractor == "ocr":
            return protocol.Extracted(text="words in the picture")
        return protocol.Extracted(array=np.ones((2, 4), np.float16))
    if isinstance(task, protocol.FuseTask):
        return tags_of(task)
    raise TypeError(f"no answer to {task}")


def decoded(kind: PartKind) -> protocol.Decoded:
    """One array for a feature, and one picture to read."""
    parts = [protocol.Part(kind, protocol.ArrayRef(0, 0, (1, 2, 2, 3), "uint8"))]
    if kind != "sound":
        parts.append(protocol.Part("picture", protocol.ArrayRef(0, 64, (2, 2, 3), "uint8")))
    return protocol.Decoded(tuple(parts))


def tags_of(task: protocol.FuseTask, version: str = "1") -> Tags:
    scores = np.array([0.9, 0.1])
    return Tags(task.features.post_id, "fake", version, (Tag(0, "sport", 0.9),), scores)
