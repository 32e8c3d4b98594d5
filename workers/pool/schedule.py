"""Which task goes to which worker, and whom a death is charged to: pure, it knows no process.

Each lane (fetch, decode, one per extractor, fuse) has a queue, oldest of the highest priority
first. A worker is sent tasks of a lane until one full batch of it waits in its pipe behind the
batch that runs: enough that it never idles, little enough that a late idle worker finds work
here. What waits here is what later arrivals are batched with.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from config.settings import Settings
from workers.pool.batching import Lane, batch_rows, lane_of, stage_of, weight_of
from workers.pool.slots import SlotTable
from workers.protocol import DecodeTask, Envelope, ExtractTask, Task

MAX_QUEUED = 1 << 16
_MAX_DELIVERIES = 5


@dataclass(slots=True)
class Entry:
    """One task in the pool.

    Attributes:
        dropped: The caller wants no answer: it cancelled, or was told of a missed deadline.
        solo: Suspected of killing a worker: runs alone.
        holder: The worker that has it; None while it is queued.
        deliveries: How many workers it was sent to.
        batch: Tasks that began together with it; 0 while it has not begun.
    """

    task_id: int
    task: Task
    lane: Lane
    deadline: float
    key: tuple[int, int]
    weight: float
    refs: frozenset[int]
    slot: int | None = None
    holder: str | None = None
    dropped: bool = False
    solo: bool = False
    deliveries: int = 0
    batch: int = 0
    sent_at: float = 0.0
    begun_at: float = 0.0

    @property
    def stage(self) -> str:
        """``recall``, ``fetch``, ``decode``, ``extract`` or ``fuse``."""
        return stage_of(self.lane)


@dataclass(slots=True)
class Load:
    """What one ready worker holds."""

    name: str
    lanes: tuple[Lane, ...]
    at_most: int | None
    limit_s: float
    held: dict[int, Entry] = field(default_factory=dict)
    waiting: dict[Lane, float] = field(default_factory=dict)
    heard_at: float = 0.0
    done: int = 0

    @property
    def weight(self) -> float:
        """Batches that it holds."""
        return sum(entry.weight for entry in self.held.values())


@dataclass(frozen=True, slots=True)
class Overdue:
    """Tasks that missed their deadline, and workers that hold one for too long."""

    failed: tuple[Entry, ...]
    kill: dict[str, frozenset[int]]


class Scheduler:
    """Queues, loads and slots of the pool."""

    def __init__(self, settings: Settings, *, grace_s: float = 5.0) -> None:
        self._rows = batch_rows(settings)
        self.slots = SlotTable(settings.workers.slots)
        self._grace_s = grace_s
        self._decode_backlog = settings.workers.slots + settings.decode.processes
        self._ids = itertools.count(1)
        self._entries: dict[int, Entry] = {}
        self._queues: dict[Lane, list[tuple[tuple[int, int], Entry]]] = {}
        self._queued: dict[Lane, int] = {}
        self._suspects: dict[Lane, deque[Entry]] = {}
        self._loads: dict[str, Load] = {}

    # The caller's side ------------------------------------------------------------------------

    def __len__(self) -> int:
        """Tasks that the caller still waits for."""
        return len(self._entries)

    @property
    def busy(self) -> bool:
        """Whether any task is queued or held by a worker."""
        return bool(self._entries) or any(load.held for load in self._loads.values())

    def submit(self, task: Task, deadline: float, priority: int = 0) -> int:
        """Queue a task.

        Raises:
            ValueError: It refers to a slot that the caller does not own.
            RuntimeError: The queue is full: the caller took in more than it may.
        """
        if len(self._entries) >= MAX_QUEUED:
            raise RuntimeError(f"{MAX_QUEUED} tasks are queued: intake is not bounded")
        refs: frozenset[int] = frozenset()
        if isinstance(task, ExtractTask):
            refs = frozenset(ref.slot for ref in task.refs)
        retained: list[int] = []
        try:
            for slot in refs:
                self.slots.retain(slot)
                retained.append(slot)
        except ValueError:
            for slot in retained:
                self.slots.drop(slot)
            raise
        task_id = next(self._ids)
        key, weight = (-priority, task_id), weight_of(task, self._rows)
        entry = Entry(task_id, task, lane_of(task), deadline, key, weight, refs)
        self._entries[task_id] = entry
        self._enqueue(entry)
        return task_id

    def cancel(self, task_id: int) -> None:
        """Forget a task; an unknown or ended one is no mistake."""
        entry = self._entries.get(task_id)
        if entry is not None:
            self._drop(entry)

    def queued(self, lane: Lane) -> int:
        """Tasks of a lane that no worker holds."""
        return self._queued.get(lane, 0)

    # The workers' side ------------------------------------------------------------------------

    def add(self, load: Load) -> None:
        """A worker is ready."""
        self._loads[load.name] = load

    def load(self, name: str) -> Load | None:
        """What a ready worker holds; None for one that is not ready."""
        return self._loads.get(name)

    def dispatch(self, now: float) -> Iterator[tuple[str, Envelope]]:
        """Give out what fits, the least loaded worker first, a task at a time."""
        moved = True
        while moved:
            moved = False
            for load in sorted(self._loads.values(), key=lambda each: each.weight):
                entry = self._next_for(load, now)
                if entry is not None:
                    moved = True
                    yield load.name, self._hand(entry, load, now)

    def began(self, name: str, task_ids: Iterable[int], now: float) -> None:
        """A worker runs these as one batch."""
        load = self._loads[name]
        load.heard_at = now
        entries = [load.held[i] for i in task_ids if i in load.held]
        for entry in entries:
            if not entry.batch:
                load.waiting[entry.lane] -= entry.weight
            entry.batch, entry.begun_at = len(entries), now

    def ended(self, name: str, task_id: int, now: float, *, gives_slot: bool) -> Entry | None:
        """A worker answered; None when nobody waits for the answer (any more).

        With ``gives_slot`` the answer names arrays in the task's slot: it is the caller's now.
        """
        load = self._loads[name]
        load.heard_at = now
        load.done += 1
        entry = load.held.pop(task_id, None)
        if entry is None:
            return None
        entry.holder = None
        if not entry.batch:
            load.waiting[entry.lane] -= entry.weight
        if entry.slot is not None and gives_slot and not entry.dropped:
            self.slots.hand_over(entry.slot)
            entry.slot = None
        self._forget(entry)
        return None if entry.dropped else entry

    def died(self, name: str, culprits: frozenset[int] | None = None) -> list[Entry]:
        """A worker is dead: give back the tasks to fail; the others are queued again.

        ``culprits`` are the overdue tasks that it was killed for; None when it died by itself.

        A task that ran alone is charged. When several ran, each is a suspect and runs alone next
        time: only the one that kills again is charged. What had not begun is innocent.
        """
        load = self._loads.pop(name, None)
        held = sorted(load.held.values(), key=lambda e: e.key) if load else []
        begun = sum(entry.batch > 0 for entry in held)
        charged: list[Entry] = []
        for entry in held:
            entry.holder = None
            if culprits is None:
                suspect = entry.batch > 0
                alone = entry.batch == 1 and begun == 1
            else:
                suspect = entry.batch > 1 or (entry.batch == 1 and entry.task_id in culprits)
                alone = entry.batch == 1
            if entry.dropped:
                self._forget(entry)
            elif (suspect and (alone or entry.solo)) or entry.deliveries >= _MAX_DELIVERIES:
                self._forget(entry)
                charged.append(entry)
            else:
                self._requeue(entry, solo=suspect)
        return charged

    def strand(self, lane: Lane) -> list[Entry]:
        """Give back the queued tasks of a lane that no worker serves now."""
        if not self._queued.get(lane) or any(lane in load.lanes for load in self._loads.values()):
            return []
        stranded = [entry for _, entry in self._queues[lane] if not entry.dropped]
        for entry in stranded:
            self._drop(entry)
        return stranded

    def overdue(self, now: float) -> Overdue:
        """Fail tasks past their deadline (once), and find the workers to kill.

        A task fails at its own deadline. Its worker is killed for it only when the task has had
        its fair time to run: killing costs the other tasks of the worker, and loading a model.
        """
        failed = [entry for entry in self._entries.values() if entry.deadline <= now]
        for entry in failed:
            self._drop(entry)
        kill: dict[str, frozenset[int]] = {}
        for load in self._loads.values():
            late = frozenset(i for i, e in load.held.items() if self._kill_at(e, load) <= now)
            if late:
                kill[load.name] = late
        return Overdue(tuple(failed), kill)

    # Parts ------------------------------------------------------------------------------------

    def _enqueue(self, entry: Entry) -> None:
        heapq.heappush(self._queues.setdefault(entry.lane, []), (entry.key, entry))
        self._queued[entry.lane] = self._queued.get(entry.lane, 0) + 1

    def _requeue(self, entry: Entry, *, solo: bool) -> None:
        if entry.slot is not None:
            self.slots.abandon(entry.slot)
            entry.slot = None
        entry.batch = 0
        entry.solo = entry.solo or solo
        if entry.solo:
            self._suspects.setdefault(entry.lane, deque()).append(entry)
        else:
            self._enqueue(entry)

    def _drop(self, entry: Entry) -> None:
        entry.dropped = True
        self._entries.pop(entry.task_id, None)
        if entry.holder is not None:
            return  # its worker may still read or write the slot
        self._forget(entry)
        if entry.solo:
            self._suspects[entry.lane].remove(entry)
        else:
            self._queued[entry.lane] -= 1
            self._compact(entry.lane)

    def _forget(self, entry: Entry) -> None:
        self._entries.pop(entry.task_id, None)
        for slot in entry.refs:
            self.slots.drop(slot)
        entry.refs = frozenset()
        if entry.slot is not None:
            self.slots.abandon(entry.slot)
            entry.slot = None

    def _compact(self, lane: Lane) -> None:
        """Rebuild a queue that is mostly cancelled tasks, so that they do not pile up."""
        queue = self._queues[lane]
        if len(queue) > 2 * self._queued[lane] + 32:
            queue[:] = [item for item in queue if not item[1].dropped]
            heapq.heapify(queue)

    def _kill_at(self, entry: Entry, load: Load) -> float:
        if entry.batch:
            since = entry.begun_at
        elif any(other.batch for other in load.held.values()):
            return float("inf")  # it waits behind a batch that has its own limit
        else:
            since = max(entry.sent_at, load.heard_at)
        return min(since + load.limit_s, max(entry.deadline, since + self._grace_s))

    def _next_for(self, load: Load, now: float) -> Entry | None:
        for lane in load.lanes:
            if self._suspects.get(lane):
                # A suspect runs alone: the worker takes nothing new until it is empty.
                if load.held or not self._open(lane):
                    return None
                return self._suspects[lane].popleft()
        if load.at_most is not None and len(load.held) >= load.at_most:
            return None
        if any(entry.solo for entry in load.held.values()):
            return None
        best: Lane | None = None
        for lane in load.lanes:
            head = self._head(lane)
            if head is None or not self._open(lane):
                continue
            waiting = load.waiting.get(lane, 0.0)
            if load.at_most is None and waiting > 0.001 and waiting + head.weight > 1.001:
                continue
            if best is None or head.key < self._queues[best][0][0]:
                best = lane
        if best is None:
            return None
        self._queued[best] -= 1
        return heapq.heappop(self._queues[best])[1]

    def _open(self, lane: Lane) -> bool:
        if lane == "decode":
            return self.slots.free > 0
        # Files wait on disk for a decoder: what is full downstream stops the downloads.
        return lane != "fetch" or self.queued("decode") < self._decode_backlog

    def _head(self, lane: Lane) -> Entry | None:
        queue = self._queues.get(lane)
        while queue and queue[0][1].dropped:
            heapq.heappop(queue)
        return queue[0][1] if queue else None

    def _hand(self, entry: Entry, load: Load, now: float) -> Envelope:
        task = entry.task
        if isinstance(task, DecodeTask):
            entry.slot = self.slots.acquire()
            if entry.slot is None:
                raise RuntimeError("a decode task was picked without a free slot")
            task = replace(task, slot=entry.slot)
        entry.deliveries += 1
        entry.sent_at, entry.holder = now, load.name
        load.held[entry.task_id] = entry
        load.waiting[entry.lane] = load.waiting.get(entry.lane, 0.0) + entry.weight
        return Envelope(entry.task_id, task, entry.deadline, entry.solo)
