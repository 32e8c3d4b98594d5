"""The worker pool in this process: one task after the other, no process, no queue.

    with local_runner(settings) as runner:
        tags = runner.run(post).tags

`LocalPool` keeps the promises of `workers.protocol.TaskPool` with the task functions of the
worker processes, so that a post takes the same way as in the daemon.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import threading
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.errors import BundleError, ConfigError
from common.fingerprint import mismatch
from common.post import Failure, Modality, Stream
from config.features import ExtractorName
from config.settings import Settings
from extractors.parts import slot_bytes
from extractors.suite import ALL_EXTRACTORS, ExtractorSuite
from workers.cache.entries import GuardedStore
from workers.cache.features import FeatureCache
from workers.fetch import Fetcher, file_name
from workers.pool.channel import Arena, SlotTable
from workers.protocol import (
    CacheHits,
    CacheLookup,
    Decoded,
    DecodeTask,
    Done,
    ExtractTask,
    Failed,
    Fetched,
    FetchTask,
    FuseTask,
    PoolEvent,
    PoolReady,
    Task,
    WorkerView,
)
from workers.roles.batched import open_bundle, run_decode, run_extract, run_fuse
from workers.roles.loop import DeviceLost, Outcome, failure_of
from workers.runner import PostRunner

if TYPE_CHECKING:
    from fusion.infer.inferer import Inferer


def local_runner(
    settings: Settings,
    *,
    fuse: bool = True,
    device: str | None = None,
    modalities: frozenset[Modality] | None = None,
    lazy: bool = False,
) -> PostRunner:
    """Return a runner whose models are all in this process.

    Posts have no time limit here: nothing else waits for them, and one device does all the work.

    Args:
        settings: Of the features, and of the fusion.
        fuse: Give tags; without, no bundle is loaded.
        device: Replaces that of the first extractor placement.
        modalities: As in `PostRunner`; all models are loaded.
        lazy: As in `LocalPool`.
    """
    pool = LocalPool(settings, fuse=fuse, device=device, lazy=lazy)
    return PostRunner(settings, fuse=fuse, pool=pool, modalities=modalities, post_limit_s=math.inf)


class LocalPool:
    """A pool without processes; `poll` runs one task and returns its event.

    It hosts ``extractors`` only, or all.
    With ``lazy`` an encoder is loaded when the first post needs it; a fusion or a cache, which need
    the fingerprints of all, load all at the start.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        fuse: bool = True,
        extractors: Collection[ExtractorName] | None = None,
        device: str | None = None,
        lazy: bool = False,
    ) -> None:
        first = settings.workers.extractors[0]
        self.ready = False
        self.refused: str | None = None
        self.bundle: tuple[str, str] | None = None
        self.workers: list[WorkerView] = []
        self._settings = settings
        self._fuse = fuse
        self._lazy = lazy and not fuse and settings.cache.url is None
        self._device = device or first.device
        # One slot: a media file's arrays are extracted before the next file is decoded.
        self._slots = SlotTable(1)
        self._arena = Arena.private(1, slot_bytes(settings))
        names = [name for name in ALL_EXTRACTORS if extractors is None or name in extractors]
        self._suite = ExtractorSuite(settings.features, self._device, names, threads=first.threads)
        self._ids = itertools.count(1)
        self._queue: dict[int, Task] = {}
        self._woken = threading.Event()
        self._open = contextlib.ExitStack()
        self._inferer: Inferer | None = None
        self._cache: FeatureCache | None = None
        self._fetcher: Fetcher | None = None
        self._spool: Path | None = None

    @property
    def fingerprints(self) -> dict[Stream, str]:
        return self._suite.fingerprints if self.ready else {}

    def start(self) -> None:
        """Load the models.

        Raises:
            ConfigError: Weights are missing, or the bundle is missing, broken, or made for other
                features.
        """
        self._open.callback(self._suite.close)
        # A bundle that is missing is told before the encoders, which take long to load.
        inferer = self._open_bundle() if self._fuse else None
        if not self._lazy:
            self._suite.load()
        if self._settings.cache.url is not None:
            store = GuardedStore.open(self._settings.cache)
            self._open.callback(store.close)
            self._cache = FeatureCache(store, self._settings)
            self._cache.expect(self._suite.by_extractor)
        if inferer is not None:
            wrong = mismatch(inferer.fingerprints, self._suite.fingerprints)
            if wrong is not None:
                raise ConfigError(f"fusion.bundle: {self._settings.fusion.bundle}: {wrong}")
            self._inferer = inferer
            self.bundle = (inferer.name, inferer.version)

    def submit(self, task: Task, *, deadline: float, priority: int = 0, turn: int = 0) -> int:
        """Queue a task; the newest is run first, whatever its priority."""
        del deadline, priority, turn
        if isinstance(task, ExtractTask):
            for ref in task.refs[:1]:  # all arrays of a task lie in one slot
                self._slots.retain(ref.slot)
        task_id = next(self._ids)
        self._queue[task_id] = task
        return task_id

    def cancel(self, task_id: int) -> None:
        task = self._queue.pop(task_id, None)
        if task is not None:
            self._drop_slot(task)

    def release(self, slot: int) -> None:
        self._slots.release(slot)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Run one task; without any, wait for `wake`."""
        if not self.ready:
            self.ready = True
            return [PoolReady()]
        # The newest that can run: posts go depth first, and hold little meanwhile.
        for task_id, task in reversed(self._queue.items()):
            if not isinstance(task, DecodeTask) or self._slots.free:
                del self._queue[task_id]
                return [self._run(task_id, task)]
        self._woken.wait(timeout_s)
        self._woken.clear()
        return []

    def wake(self) -> None:
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        """Free models, memory and files."""
        del timeout_s
        self._queue.clear()
        self._open.close()
        self._arena.close()

    def _run(self, task_id: int, task: Task) -> Done | Failed:
        try:
            outcome = self._execute(task, task_id)
        except (DeviceLost, ConfigError):  # neither is the fault of the post
            raise
        except Exception as error:  # noqa: BLE001 - the loop: a task costs only itself
            outcome = failure_of(task.stage, error)
        self._drop_slot(task)
        if self._cache is not None:
            self._cache.learn(task, outcome)
        if isinstance(outcome, Failure):
            return Failed(task_id, outcome)
        return Done(task_id, outcome)

    def _execute(self, task: Task, task_id: int) -> Outcome:
        match task:
            case CacheLookup():
                return self._cache.lookup(task) if self._cache is not None else CacheHits()
            case FetchTask():
                return self._fetch(task, task_id)
            case DecodeTask():
                return self._decode(task)
            case ExtractTask():
                self._suite.load({task.extractor})
                return run_extract(self._suite, [task], self._arena)[0]
            case FuseTask():
                if self._inferer is None:
                    raise RuntimeError("this pool has no fusion")
                return run_fuse(self._inferer, [task])[0]

    def _fetch(self, task: FetchTask, task_id: int) -> Fetched:
        if self._fetcher is None or self._spool is None:
            folder = tempfile.TemporaryDirectory(prefix="insighttag-")
            self._spool = Path(self._open.enter_context(folder))
            self._fetcher = self._open.enter_context(closing(Fetcher(self._settings.fetch)))
        return self._fetcher.fetch(task.media, self._spool / file_name(task_id))

    def _decode(self, task: DecodeTask) -> Decoded:
        slot = self._slots.acquire()
        if slot is None:
            raise RuntimeError("no slot is free")
        decoded: Decoded | None = None
        try:
            placed = msgspec.structs.replace(task, slot=slot)
            features, limits = self._settings.features, self._settings.decode
            decoded = run_decode(placed, features, limits, self._arena)
        finally:
            if decoded is not None and decoded.parts:
                self._slots.hand_over(slot)
            else:
                self._slots.abandon(slot)
        return decoded

    def _drop_slot(self, task: Task) -> None:
        if isinstance(task, ExtractTask):
            for ref in task.refs[:1]:
                self._slots.drop(ref.slot)

    def _open_bundle(self) -> Inferer:
        try:
            inferer = open_bundle(self._settings.fusion, self._device)
        except BundleError as error:
            raise ConfigError(f"fusion.bundle: {error}") from error
        self._open.callback(inferer.close)
        return inferer
