"""The worker pool in this process: one task after the other, no process, no queue.

    with local_runner(settings) as runner:
        tags = runner.run(post).tags

`LocalPool` keeps the promises of `workers.protocol.TaskPool` with the task functions of the
worker processes, so that a post takes the same way as in the daemon.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.errors import BundleError, ConfigError
from common.fingerprint import mismatch
from common.post import Failure, Stream
from config.settings import Settings
from extractors.parts import slot_bytes
from workers.cache.entries import GuardedStore
from workers.cache.features import FeatureCache
from workers.fetch.client import Fetcher
from workers.fetch.spool import file_name
from workers.pool.arena import Arena, SlotTable
from workers.protocol import (
    CacheHits,
    CacheLookup,
    Decoded,
    DecodeTask,
    ExtractTask,
    Fetched,
    FetchTask,
    FuseTask,
    PoolEvent,
    PoolReady,
    Task,
    TaskDone,
    TaskFailed,
    WorkerView,
)
from workers.roles.batched import run_decode, run_extract, run_fuse
from workers.roles.loop import DeviceLost, Outcome, failure_of
from workers.runner import PostRunner

if TYPE_CHECKING:
    from extractors.suite import ExtractorSuite
    from fusion.infer.inferer import Inferer

_NAME = "local"


def local_runner(settings: Settings, *, fuse: bool = True, device: str | None = None) -> PostRunner:
    """Return a runner whose models are all in this process.

    Posts have no time limit here: nothing else waits for them, and one device does all the work.

    Args:
        settings: Of the features, and of the fusion.
        fuse: Give tags; without, no bundle is loaded.
        device: Replaces that of the first extractor placement.
    """
    pool = LocalPool(settings, fuse=fuse, device=device)
    return PostRunner(settings, fuse=fuse, pool=pool, post_limit_s=math.inf)


@dataclass(frozen=True, slots=True)
class _Entry:
    task_id: int
    task: Task


class LocalPool:
    """A pool without processes; `poll` runs one task and gives its event.

    Attributes:
        ready: The models are loaded.
        refused: Always None: what cannot be loaded is raised by `start`.
        bundle: Name and version of the bundle, once loaded.
    """

    def __init__(self, settings: Settings, *, fuse: bool = True, device: str | None = None) -> None:
        first = settings.workers.extractors[0]
        self.ready = False
        self.refused: str | None = None
        self.bundle: tuple[str, str] | None = None
        self._settings = settings
        self._fuse = fuse
        self._device = device or first.device
        self._threads = first.threads
        # One slot: a media file's arrays are extracted before the next file is decoded.
        self._slots = SlotTable(1)
        self._arena: Arena | None = None
        self._suite: ExtractorSuite | None = None
        self._inferer: Inferer | None = None
        self._cache: FeatureCache | None = None
        self._fetcher: Fetcher | None = None
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._ids = itertools.count(1)
        self._queue: list[_Entry] = []
        self._woken = threading.Event()

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Stream -> fingerprint of the features, once ready."""
        return self._suite.fingerprints if self._suite is not None else {}

    @property
    def workers(self) -> list[WorkerView]:
        return []

    def start(self) -> None:
        """Load the models.

        Raises:
            ConfigError: Weights are missing, or the bundle is missing, broken, or made for other
                features.
        """
        from extractors.suite import ExtractorSuite

        self._suite = ExtractorSuite(self._settings.features, self._device, threads=self._threads)
        self._suite.load()
        self._arena = Arena.private(len(self._slots), slot_bytes(self._settings))
        if self._settings.cache.url is not None:
            self._cache = FeatureCache(GuardedStore.open(self._settings.cache), self._settings)
            self._cache.expect(self._suite.by_extractor)
        if self._fuse:
            self._inferer = self._open_bundle()
            self.bundle = (self._inferer.name, self._inferer.version)

    def submit(self, task: Task, *, deadline: float, priority: int = 0) -> int:
        """Queue a task; the newest is run first, whatever its priority."""
        del deadline, priority
        if isinstance(task, ExtractTask):
            for ref in task.refs[:1]:
                self._slots.retain(ref.slot)
        entry = _Entry(next(self._ids), task)
        self._queue.append(entry)
        return entry.task_id

    def cancel(self, task_id: int) -> None:
        """Forget a queued task."""
        for entry in [entry for entry in self._queue if entry.task_id == task_id]:
            self._queue.remove(entry)
            self._drop_slot(entry.task)

    def release(self, slot: int) -> None:
        """Take note that no more tasks will refer to a decoded slot."""
        self._slots.release(slot)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Run one task; without any, wait for `wake`."""
        if not self.ready:
            self.ready = True
            return [PoolReady()]
        entry = self._next()
        if entry is None:
            self._woken.wait(timeout_s)
            self._woken.clear()
            return []
        return [self._run(entry)]

    def wake(self) -> None:
        """Interrupt `poll`; from any thread."""
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        """Free models, memory and files."""
        del timeout_s
        self._queue.clear()
        store = self._cache.store if self._cache is not None else None
        for each in (self._suite, self._inferer, self._fetcher, self._arena, store):
            if each is not None:
                each.close()
        if self._spool is not None:
            self._spool.cleanup()
        self._suite = self._inferer = self._fetcher = self._arena = None
        self._cache = self._spool = None

    def _next(self) -> _Entry | None:
        """Take the newest task that can run: posts go depth first, and hold little meanwhile."""
        for entry in reversed(self._queue):
            if not isinstance(entry.task, DecodeTask) or self._slots.free:
                self._queue.remove(entry)
                return entry
        return None

    def _run(self, entry: _Entry) -> TaskDone | TaskFailed:
        began = time.perf_counter()
        task = entry.task
        try:
            outcome = self._execute(task, entry.task_id)
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - the loop: a task costs only itself
            outcome = failure_of(task.stage, error)
        self._drop_slot(task)
        if self._cache is not None:
            self._cache.learn(task, outcome)
        if isinstance(outcome, Failure):
            return TaskFailed(entry.task_id, outcome, _NAME)
        return TaskDone(entry.task_id, outcome, time.perf_counter() - began, _NAME)

    def _execute(self, task: Task, task_id: int) -> Outcome:
        if self._suite is None or self._arena is None:
            raise RuntimeError("start() comes first")
        match task:
            case CacheLookup():
                return self._cache.lookup(task) if self._cache is not None else CacheHits()
            case FetchTask():
                return self._fetch(task, task_id)
            case DecodeTask():
                return self._decode(task, self._arena)
            case ExtractTask():
                return run_extract(self._suite, [task], self._arena)[0]
            case FuseTask():
                if self._inferer is None:
                    raise RuntimeError("this pool has no fusion")
                return run_fuse(self._inferer, [task])[0]

    def _fetch(self, task: FetchTask, task_id: int) -> Fetched:
        if self._spool is None:
            self._spool = tempfile.TemporaryDirectory(prefix="insighttag-")
        if self._fetcher is None:
            self._fetcher = Fetcher(self._settings.fetch)
        return self._fetcher.fetch(task.media, Path(self._spool.name) / file_name(task_id))

    def _decode(self, task: DecodeTask, arena: Arena) -> Decoded:
        slot = self._slots.acquire()
        if slot is None:
            raise RuntimeError("no slot is free")
        decoded: Decoded | None = None
        try:
            decoded = run_decode(
                msgspec.structs.replace(task, slot=slot),
                self._settings.features,
                self._settings.decode,
                arena,
            )
        finally:
            if decoded is not None and decoded.parts:
                self._slots.hand_over(slot)
            else:
                self._slots.abandon(slot)
        return decoded

    def _drop_slot(self, task: Task) -> None:
        if isinstance(task, ExtractTask):
            for ref in task.refs[:1]:  # all arrays of a task lie in one slot
                self._slots.drop(ref.slot)

    def _open_bundle(self) -> Inferer:
        from workers.roles.batched import open_bundle

        try:
            inferer = open_bundle(self._settings.fusion, self._device)
        except BundleError as error:
            raise ConfigError(f"fusion.bundle: {error}") from error
        wrong = mismatch(inferer.fingerprints, self.fingerprints)
        if wrong is not None:
            inferer.close()
            raise ConfigError(f"fusion.bundle: {self._settings.fusion.bundle}: {wrong}")
        return inferer
