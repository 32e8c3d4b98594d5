"""Assignment of tasks to workers, and of deaths to tasks: pure, it knows no process.

There is a task queue for each of lookup, fetch, decode, every extractor, and fuse; tasks of the
highest priority come first, of those the ones whose post has its turn first. A worker is sent tasks
until one full batch waits in its channel behind the batch that runs: enough that it never idles,
and few enough that another worker that becomes idle finds work here. On a GPU, which needs full
batches, one of each queue may wait. Tasks that wait here are batched with later ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from config.settings import Settings
from extractors.parts import PICTURES_ON_CPU, TEXTS_ON_CPU
from workers.pool.channel import SlotTable
from workers.protocol import DecodeTask, Envelope, ExtractTask, FetchTask, Task

TaskQueue: TypeAlias = str
"""``lookup``, ``fetch``, ``decode``, ``fuse``, or an extractor's name."""

MAX_QUEUED = 1 << 16
"""Tasks in the pool. Posts in flight times tasks a post is a few hundred; this only stops a caller
without a bound before memory does."""

_MAX_DELIVERIES = 5
"""Workers that a task is sent to. Each death doubles the evidence against it; with fewer, a task
would be charged with the deaths of its neighbours, with more it would kill more workers."""

_FULL = 0.999
"""Of a batch: the shares of tasks that fill it may add up to a thousandth less or more than 1."""

_SHARE_GATHERED: Mapping[TaskQueue, int] = {"fuse": 4, "text": 8}
"""Posts wait for fusion, and texts for their encoder, until they are one in so many of the open
tasks: a pass of the fusion model takes for one post nearly as long as for eight, since it reads all
weights, and of eight texts each takes half as long as one alone. At half, other workers may run out
of posts; at double, batches are half as large."""

_NOT_GATHERED = 8
"""Open tasks that nobody waits for, so that a post that is nearly alone is not held back."""

_GATHER_S = 0.1
"""Or until this has passed: a tenth of a second more before a post's tags, and only under load."""


def queue_of(task: Task) -> TaskQueue:
    """Return the queue of a task: tasks of one queue can be one batch."""
    return task.extractor if isinstance(task, ExtractTask) else task.stage


def batch_rows(settings: Settings) -> Mapping[TaskQueue, int]:
    """Return the rows of a full batch: frames, images, patches, texts, pictures or posts.

    With one row, each task is a batch of its own; its extractor cuts it as its settings say. The
    scheduler and the workers count alike, so that tasks that are sent together run together.
    """
    features, workers, fuse = settings.features, settings.workers, settings.fusion.batch_size
    if not workers.share_batches:
        return dict.fromkeys(("video", "image", "audio", "text", "ocr", "asr"), 1) | {"fuse": fuse}
    on_cpu = all(group.device == "cpu" for group in workers.extractors)
    pictures, texts = (PICTURES_ON_CPU, TEXTS_ON_CPU) if on_cpu else (MAX_QUEUED, MAX_QUEUED)
    hosts = [
        features.ocr.pictures_at_once(group.device, group.threads)
        for group in workers.extractors
        if "ocr" in group.extractors
    ]
    return {
        "fuse": fuse,
        "video": min(features.video.batch_size, pictures),
        "image": min(features.image.batch_size, pictures),
        "audio": features.audio.batch_size,
        "text": min(features.text.batch_size, texts),
        "asr": features.asr.batch_size,
        "ocr": min(hosts, default=1),  # more would only wait
    }


def weight_of(task: Task, rows: Mapping[TaskQueue, int]) -> float:
    """Return the share of a full batch that a task takes, at most 1."""
    task_queue, count = queue_of(task), 1
    if isinstance(task, ExtractTask) and task_queue == "ocr":
        count = len(task.refs)
    elif isinstance(task, ExtractTask) and task_queue != "text":
        count = sum(ref.shape[0] for ref in task.refs if ref.shape)
    return min(1.0, count / rows.get(task_queue, 1))


@dataclass(slots=True)
class QueuedTask:
    """One task in the pool.

    Attributes:
        dropped: The caller wants no answer: it cancelled, or was told of a missed deadline.
        solo: Suspected of killing a worker: runs alone.
        holder: The worker that has it; None while it is queued.
        deliveries: Number of workers that it was sent to.
        batch: Tasks that began together with it; 0 while it has not begun.
    """

    task_id: int
    task: Task
    queue_name: TaskQueue
    deadline: float
    key: tuple[int, int, int]
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


@dataclass(slots=True)
class WorkerLoad:
    """The tasks that one ready worker holds.

    Attributes:
        at_once: It begins each task as it comes, by itself, and does not say so.
        on_cpu: One batch of any of its queues waits for it, and not one of each.
        batches: Batches that it has begun.
    """

    name: str
    queues: tuple[TaskQueue, ...]
    at_most: int | None
    limit_s: float
    at_once: bool = False
    on_cpu: bool = False
    tasks: dict[int, QueuedTask] = field(default_factory=dict)
    waiting: dict[TaskQueue, float] = field(default_factory=dict)
    heard_at: float = 0.0
    done: int = 0
    batches: int = 0

    @property
    def weight(self) -> float:
        """Return the number of full batches that it holds."""
        return sum(queued.weight for queued in self.tasks.values())


@dataclass(frozen=True, slots=True)
class Overdue:
    """Tasks that missed their deadline, and workers that hold one for too long."""

    failed: tuple[QueuedTask, ...]
    kill: dict[str, frozenset[int]]


class Scheduler:
    """Queues, loads and slots of the pool."""

    def __init__(self, settings: Settings, *, grace_s: float = 5.0) -> None:
        self._rows = batch_rows(settings)
        self.slots = SlotTable(settings.workers.slots)
        self._grace_s = grace_s
        self._decode_backlog = settings.workers.slots + settings.decode.processes
        self._ids = itertools.count(1)
        self._open_tasks: dict[int, QueuedTask] = {}
        self._queues: dict[TaskQueue, list[tuple[tuple[int, int, int], QueuedTask]]] = {}
        self._queue_sizes: dict[TaskQueue, int] = {}
        self._suspects: dict[TaskQueue, deque[QueuedTask]] = {}
        self._loads: dict[str, WorkerLoad] = {}
        self._gathered = dict.fromkeys(_SHARE_GATHERED, False)
        self._none_at = dict.fromkeys(_SHARE_GATHERED, 0.0)

    def __len__(self) -> int:
        return len(self._open_tasks)

    @property
    def busy(self) -> bool:
        return bool(self._open_tasks) or any(load.tasks for load in self._loads.values())

    def submit(self, task: Task, deadline: float, priority: int = 0, turn: int = 0) -> int:
        """Queue a task; of one priority the lowest turn comes first, then the oldest.

        Raises:
            ValueError: It refers to a slot that the caller does not own.
            RuntimeError: The queue is full: the caller took in more than it may.
        """
        if len(self._open_tasks) >= MAX_QUEUED:
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
        key, weight = (-priority, turn, task_id), weight_of(task, self._rows)
        queued = QueuedTask(task_id, task, queue_of(task), deadline, key, weight, refs)
        self._open_tasks[task_id] = queued
        self._enqueue(queued)
        return task_id

    def cancel(self, task_id: int) -> None:
        """Forget a task; unknown and ended ones are ignored."""
        queued = self._open_tasks.get(task_id)
        if queued is not None:
            self._drop(queued)

    def queued(self, queue_name: TaskQueue) -> int:
        """Return the number of tasks of a queue that no worker holds."""
        return self._queue_sizes.get(queue_name, 0)

    def add(self, load: WorkerLoad) -> None:
        self._loads[load.name] = load

    def load(self, name: str) -> WorkerLoad | None:
        """Return what a ready worker holds; None for one that is not ready."""
        return self._loads.get(name)

    def dispatch(self, now: float) -> Iterator[tuple[str, Envelope]]:
        """Assign what fits, the least loaded worker first, a task at a time."""
        self._gather(now)
        moved = True
        while moved:
            moved = False
            waiting = [load for load in self._loads.values() if self._waits_for(load)]
            for load in sorted(waiting, key=lambda each: each.weight):
                queued = self._next_for(load, now)
                if queued is not None:
                    moved = True
                    yield load.name, self._assign(queued, load, now)
        self._gather(now)

    def _gather(self, now: float) -> None:
        """Hold tasks of some queues back while few wait there and many are open."""
        beyond = len(self._open_tasks) - _NOT_GATHERED
        for name, share in _SHARE_GATHERED.items():
            waiting = self.queued(name) + len(self._suspects.get(name, ()))
            if not waiting:
                self._gathered[name], self._none_at[name] = False, now
            elif waiting >= beyond // share or now - self._none_at[name] >= _GATHER_S:
                self._gathered[name] = True

    def _waits_for(self, load: WorkerLoad) -> bool:
        """Return True when a task waits that the worker could take."""
        return any(self._queue_sizes.get(q) or self._suspects.get(q) for q in load.queues)

    def began(self, name: str, task_ids: Iterable[int], now: float) -> None:
        """Record that a worker runs these as one batch."""
        load = self._loads[name]
        load.heard_at = now
        load.batches += 1
        queued_tasks = [load.tasks[i] for i in task_ids if i in load.tasks]
        for queued in queued_tasks:
            if not queued.batch:
                load.waiting[queued.queue_name] -= queued.weight
            queued.batch, queued.begun_at = len(queued_tasks), now

    def ended(self, name: str, task_id: int, now: float, *, gives_slot: bool) -> QueuedTask | None:
        """Take a worker's answer; return None when nobody waits for it.

        With ``gives_slot`` the answer names arrays in the task's slot: it is the caller's now.
        """
        load = self._loads[name]
        load.heard_at = now
        load.done += 1
        queued = load.tasks.pop(task_id, None)
        if queued is None:
            return None
        queued.holder = None
        if not queued.batch:
            load.waiting[queued.queue_name] -= queued.weight
        if queued.slot is not None and gives_slot and not queued.dropped:
            self.slots.hand_over(queued.slot)
            queued.slot = None
        self._forget(queued)
        return None if queued.dropped else queued

    def died(self, name: str, culprits: frozenset[int] | None = None) -> list[QueuedTask]:
        """Remove a dead worker; return the tasks to fail, and queue the others again.

        ``culprits`` are the overdue tasks that it was killed for; None when it died by itself.

        A task that ran alone is charged. When several ran, each is a suspect and runs alone next
        time: only the one that kills again is charged. Tasks that had not begun are innocent.
        """
        load = self._loads.pop(name, None)
        tasks = sorted(load.tasks.values(), key=lambda each: each.key) if load else []
        begun = sum(queued.batch > 0 for queued in tasks)
        charged: list[QueuedTask] = []
        for queued in tasks:
            queued.holder = None
            if culprits is None:
                suspect = queued.batch > 0
                alone = queued.batch == 1 and begun == 1
            else:
                suspect = queued.batch > 1 or (queued.batch == 1 and queued.task_id in culprits)
                alone = queued.batch == 1
            if queued.dropped:
                self._forget(queued)
            elif (suspect and (alone or queued.solo)) or queued.deliveries >= _MAX_DELIVERIES:
                self._forget(queued)
                charged.append(queued)
            else:
                self._requeue(queued, solo=suspect)
        return charged

    def drop_unserved(self, queue_name: TaskQueue) -> list[QueuedTask]:
        """Remove and return the tasks of a queue that no worker serves now."""
        served = any(queue_name in load.queues for load in self._loads.values())
        if served or not self._queue_sizes.get(queue_name):
            return []
        unserved = [queued for _, queued in self._queues[queue_name] if not queued.dropped]
        for queued in unserved:
            self._drop(queued)
        return unserved

    def overdue(self, now: float) -> Overdue:
        """Fail tasks past their deadline (once), and find the workers to kill.

        A task fails at its own deadline. Its worker is killed for it only when the task has had
        its fair time to run: killing costs the other tasks of the worker, and loading a model.
        """
        failed = [queued for queued in self._open_tasks.values() if queued.deadline <= now]
        for queued in failed:
            self._drop(queued)
        kill: dict[str, frozenset[int]] = {}
        for load in self._loads.values():
            late = frozenset(i for i, e in load.tasks.items() if self._kill_at(e, load) <= now)
            if late:
                kill[load.name] = late
        return Overdue(tuple(failed), kill)

    def _enqueue(self, queued: QueuedTask) -> None:
        heapq.heappush(self._queues.setdefault(queued.queue_name, []), (queued.key, queued))
        self._queue_sizes[queued.queue_name] = self._queue_sizes.get(queued.queue_name, 0) + 1

    def _requeue(self, queued: QueuedTask, *, solo: bool) -> None:
        if queued.slot is not None:
            self.slots.abandon(queued.slot)
            queued.slot = None
        queued.batch = 0
        queued.solo = queued.solo or solo
        if queued.solo:
            self._suspects.setdefault(queued.queue_name, deque()).append(queued)
        else:
            self._enqueue(queued)

    def _drop(self, queued: QueuedTask) -> None:
        queued.dropped = True
        self._open_tasks.pop(queued.task_id, None)
        if queued.holder is not None:
            return  # its worker may still read or write the slot
        self._forget(queued)
        if queued.solo:
            self._suspects[queued.queue_name].remove(queued)
        else:
            self._queue_sizes[queued.queue_name] -= 1
            self._compact(queued.queue_name)

    def _forget(self, queued: QueuedTask) -> None:
        self._open_tasks.pop(queued.task_id, None)
        for slot in queued.refs:
            self.slots.drop(slot)
        queued.refs = frozenset()
        if queued.slot is not None:
            self.slots.abandon(queued.slot)
            queued.slot = None

    def _compact(self, queue_name: TaskQueue) -> None:
        """Rebuild a queue that is mostly cancelled tasks, so that they do not pile up."""
        queue = self._queues[queue_name]
        if len(queue) > 2 * self._queue_sizes[queue_name] + 32:
            queue[:] = [item for item in queue if not item[1].dropped]
            heapq.heapify(queue)

    def _kill_at(self, queued: QueuedTask, load: WorkerLoad) -> float:
        if queued.batch:
            since = queued.begun_at
        elif any(other.batch for other in load.tasks.values()):
            return float("inf")  # it waits behind a batch that has its own limit
        else:
            since = max(queued.sent_at, load.heard_at)
        return min(since + load.limit_s, max(queued.deadline, since + self._grace_s))

    def _next_for(self, load: WorkerLoad, now: float) -> QueuedTask | None:
        for queue_name in load.queues:
            if suspects := self._suspects.get(queue_name):
                # A suspect runs alone: the worker takes nothing new until it is empty.
                if load.tasks or not self._open(queue_name, suspects[0], load):
                    return None
                return self._suspects[queue_name].popleft()
        if load.at_most is not None and len(load.tasks) >= load.at_most:
            return None
        if any(queued.solo for queued in load.tasks.values()):
            return None
        full = load.on_cpu and sum(load.waiting.values()) > _FULL
        best: TaskQueue | None = None
        for queue_name in load.queues:
            head = self._head(queue_name)
            if head is None or not self._open(queue_name, head, load):
                continue
            waiting = load.waiting.get(queue_name, 0.0)
            fits = waiting + head.weight <= 2 - _FULL if waiting > 1 - _FULL else not full
            if load.at_most is None and not fits:
                continue
            if best is None or head.key < self._queues[best][0][0]:
                best = queue_name
        if best is None:
            return None
        self._queue_sizes[best] -= 1
        return heapq.heappop(self._queues[best])[1]

    def _open(self, queue_name: TaskQueue, head: QueuedTask, load: WorkerLoad) -> bool:
        if queue_name == "decode":
            return self.slots.free > 0
        if queue_name in self._gathered:
            # A worker with encoders that idles takes a text alone; the fusion worker often idles.
            idle = queue_name != "fuse" and not load.tasks
            return idle or self._gathered[queue_name]
        # Files wait on disk for a decoder: what is full downstream stops the downloads, later those
        # of files that overtake the videos there.
        is_video = isinstance(head.task, FetchTask) and head.task.media.kind == "video"
        allowed = self._decode_backlog * (1 if is_video else 2)
        return queue_name != "fetch" or self.queued("decode") < allowed

    def _head(self, queue_name: TaskQueue) -> QueuedTask | None:
        queue = self._queues.get(queue_name)
        while queue and queue[0][1].dropped:
            heapq.heappop(queue)
        return queue[0][1] if queue else None

    def _assign(self, queued: QueuedTask, load: WorkerLoad, now: float) -> Envelope:
        task = queued.task
        if isinstance(task, DecodeTask):
            queued.slot = self.slots.acquire()
            if queued.slot is None:
                raise RuntimeError("a decode task was picked without a free slot")
            task = msgspec.structs.replace(task, slot=queued.slot)
        queued.deliveries += 1
        queued.sent_at, queued.holder = now, load.name
        load.tasks[queued.task_id] = queued
        if load.at_once:
            queued.batch, queued.begun_at = 1, now
            load.batches += 1
        else:
            waiting = load.waiting.get(queued.queue_name, 0.0)
            load.waiting[queued.queue_name] = waiting + queued.weight
        return Envelope(queued.task_id, task, queued.deadline, queued.solo)
