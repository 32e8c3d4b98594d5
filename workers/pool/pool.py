"""The King's side of the workers: one event loop, driven by `ProcessPool.poll`.

It keeps four promises: each task ends in exactly one event unless it is cancelled, no call blocks
on a worker, a slot is never lost, and no process outlives the pool.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping

import msgspec
import structlog

from common.errors import ConfigError, RetryableError, WorkerDied
from common.fingerprint import differing, mismatch, packed, unpacked
from common.post import Failure, Stream
from config.features import ExtractorName
from config.settings import Settings
from extractors.feature_file import stream_fingerprints
from extractors.parts import slot_bytes
from workers.fetch import Spool
from workers.pool.channel import create_arena
from workers.pool.placement import summary
from workers.pool.scheduler import QueuedTask, Scheduler, WorkerLoad
from workers.pool.supervisor import (
    ROLES,
    TICK_S,
    Ended,
    ManagedProcess,
    Report,
    Supervisor,
    WorkerSpec,
    without_credentials,
    worker_specs,
)
from workers.protocol import (
    Began,
    BundleLoaded,
    CacheLookup,
    CacheUpdate,
    Decoded,
    Done,
    Envelope,
    Expect,
    Failed,
    Fetched,
    Launch,
    PoolEvent,
    PoolReady,
    PoolRefused,
    ProtocolError,
    Ready,
    Refused,
    Reply,
    Result,
    Task,
    WorkerRole,
    WorkerView,
    validate_reply,
)

_log = structlog.get_logger()

_TRIAL_ENDED = (
    "the fusion worker has died, perhaps because of it: restart the daemon to continue the trial"
)

_FALSE_STARTS = 3
"""Deaths in a row while loading, after which a pool that was never ready gives up. One may be a
lack of memory that passes; three with back-off between them are a broken installation, whose log
says why. A pool that has worked goes on trying: it knows that the installation is sound."""

LOOKUP_S = 2.0
"""Seconds beyond its own limit that a look-up may wait for the cache worker. Half a second would
give up while the worker is replaced; more would hold every post of a King whose cache hangs."""


class ProcessPool:
    """`workers.protocol.TaskPool` on real processes; its thread must live as long as the pool."""

    def __init__(
        self,
        settings: Settings,
        *,
        roles: Mapping[WorkerRole, str] = ROLES,
        grace_s: float = 5.0,
        fuse: bool = True,
        shadow: bool = False,
        extractors: Collection[ExtractorName] | None = None,
    ) -> None:
        """Describe the pool; starts nothing.

        Args:
            settings: Which workers, and their limits.
            roles: Role -> ``module:function``; only tests pass another.
            grace_s: A begun task runs at least this long before its deadline kills its worker.
            fuse: Whether there is a fusion worker; without one, no bundle is needed.
            shadow: Whether it tries the bundle on trial too, which costs time and memory.
            extractors: Only these are loaded; None: all.
        """
        self._settings = settings
        self._roles = roles
        self._shadow = shadow
        self._slot_bytes = slot_bytes(settings)
        self._scheduler = Scheduler(settings, grace_s=grace_s)
        self._supervisor = Supervisor(
            worker_specs(settings, fuse=fuse, extractors=extractors),
            self._launch,
            start_timeout_s=settings.workers.start_timeout_s,
        )
        self._events: list[PoolEvent] = []
        self._arena = -1
        self._spool: Spool | None = None
        self._stopped = False
        self._next_tick = 0.0
        self._has_worked = False
        self._by_extractor: dict[Stream, str] = {}
        self.fingerprints: Mapping[Stream, str] = {}
        self.ready = False
        self.refused: str | None = None
        self._loaded: BundleLoaded | None = None
        self._trial_ended = False

    @property
    def bundle(self) -> tuple[str, str] | None:
        return (self._loaded.name, self._loaded.version) if self._loaded is not None else None

    @property
    def workers(self) -> list[WorkerView]:
        return [m.view(self._scheduler.load(m.name)) for m in self._supervisor.workers.values()]

    def start(self) -> None:
        """Start every worker; raises `ConfigError` where the spool folder cannot be used."""
        self._spool = Spool(self._settings.fetch.spool)
        self._arena = create_arena(self._slot_bytes * self._settings.workers.slots)
        _log.info("workers.placed", **summary(self._settings))
        self._supervisor.on_time(time.monotonic(), restart=True)

    def submit(self, task: Task, *, deadline: float, priority: int = 0, turn: int = 0) -> int:
        """Queue a task for the next `poll`; raises `ValueError` for a slot that is not its own."""
        if isinstance(task, CacheLookup):  # a post does not wait for a cache
            deadline = min(deadline, time.monotonic() + LOOKUP_S + self._settings.cache.timeout_s)
        return self._scheduler.submit(task, deadline, priority, turn)

    def cancel(self, task_id: int) -> None:
        # An event that `poll` has returned before stays the caller's, with its slot and file.
        self._scheduler.cancel(task_id)

    def release(self, slot: int) -> None:
        self._scheduler.slots.release(slot)

    def wake(self) -> None:
        self._supervisor.wake()

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        end = time.monotonic() + timeout_s
        while not self._stopped:
            now = time.monotonic()
            self._supervisor.on_time(now, restart=self.refused is None)
            if now >= self._next_tick:
                self._next_tick = now + TICK_S
                self._enforce_deadlines(now)
            self._dispatch(now)
            until = min(end, self._supervisor.next_timer())
            if self._scheduler.busy:
                until = min(until, self._next_tick)
            urgent = self._events or self._supervisor.woken
            for report in self._supervisor.collect(0.0 if urgent else max(0.0, until - now)):
                self._on_report(report)
            now = time.monotonic()
            if self._events or self._supervisor.woken or now >= end:
                self._dispatch(now)  # the workers go on while the caller reads the events
                break
        self._supervisor.woken = False
        events, self._events = self._events, []
        return events

    def stop(self, timeout_s: float) -> None:
        if self._stopped:
            return
        self._stopped, self.ready = True, False
        self._supervisor.stop(timeout_s)
        if self._arena >= 0:
            os.close(self._arena)
            self._arena = -1
        if self._spool is not None:
            self._spool.close()

    def _dispatch(self, now: float) -> None:
        if self.ready:
            envelopes: dict[str, list[Envelope]] = {}
            for name, envelope in self._scheduler.dispatch(now):
                envelopes.setdefault(name, []).append(envelope)
            for name, assigned in envelopes.items():
                self._supervisor.send(self._supervisor.workers[name], *assigned)
            for queued in self._scheduler.drop_unserved("lookup"):
                self._fail(queued, RetryableError, "the cache worker is away")

    def _enforce_deadlines(self, now: float) -> None:
        overdue = self._scheduler.overdue(now)
        for queued in overdue.failed:
            if queued.batch:
                self._fail(queued, WorkerDied, f"{queued.queue_name} ran past its deadline")
            else:
                self._fail(queued, RetryableError, f"{queued.queue_name} waited past its deadline")
        for name, task_ids in overdue.kill.items():
            worker = self._supervisor.workers[name]
            if worker.kill_for is None:
                _log.error("workers.killed_overdue", worker=name, tasks=len(task_ids))
                worker.kill_for = task_ids
                worker.kill()

    def _fail(self, queued: QueuedTask, error: type[RetryableError], message: str) -> None:
        failure = Failure(queued.task.stage, error.__name__, message, retryable=True)
        self._events.append(Failed(queued.task_id, failure))

    def _on_report(self, report: Report) -> None:
        worker = report.worker
        if isinstance(report, Ended):
            self._on_ended(report)
            return
        try:
            self._on_message(worker, report.message)
        except ProtocolError as error:
            _log.error("workers.bad_message", worker=worker.name, error=str(error))
            worker.kill()

    def _on_ended(self, ended: Ended) -> None:
        worker = ended.worker
        load = self._scheduler.load(worker.name)
        answered = load.done if load else 0
        begun = [i for i, queued in load.tasks.items() if queued.batch] if load else []
        charged = self._scheduler.died(worker.name, worker.kill_for)
        for queued in charged:
            late = worker.kill_for is not None and queued.task_id in worker.kill_for
            what = "ran past its deadline" if late else f"died ({ended.how})"
            self._fail(queued, WorkerDied, f"worker {worker.name} {what}")
        if worker.spec.role == "fetch" and self._spool is not None:
            self._spool.remove_of(begun)
        if worker.state == "refused" or self._stopped:
            return
        planned = ended.status == 0 and answered > 0 and not begun
        again_s = worker.ended(time.monotonic(), answered=answered, planned=planned)
        if worker.spec.role == "fuse" and not planned:
            self._trial_ended = self._shadow  # posts must not die of a bundle on trial
        event = _log.info if planned else _log.warning
        event("workers.ended", worker=worker.name, how=ended.how, again_s=again_s)
        if worker.false_starts >= _FALSE_STARTS and not self._has_worked:
            times = f"failed to start {_FALSE_STARTS} times"
            reason = f"worker {worker.name} {times} ({ended.how}); its log says why"
            self._refuse(reason, mistake=False)

    def _on_message(self, worker: ManagedProcess, message: Reply) -> None:
        now = time.monotonic()
        load = self._scheduler.load(worker.name)
        match message:
            case Ready() if worker.state == "starting":
                self._on_ready(worker, message, now)
            case Refused() if worker.state == "starting" and self._has_worked:
                # A file that is being written just now: it ends by itself, and is tried again.
                _log.error("workers.cannot_load", worker=worker.name, reason=message.message)
            case Refused() if worker.state == "starting":
                worker.state = "refused"
                self._refuse(message.message)
            case BundleLoaded() if worker.spec.role == "fuse":
                self._on_bundle(message)
            case Began() if load is not None:
                self._scheduler.began(worker.name, message.task_ids, now)
            case Done() if load is not None:
                self._on_done(worker, load, message, now)
            case Failed() if load is not None:
                if worker.spec.role == "fetch" and self._spool is not None:
                    self._spool.restore()
                queued = self._scheduler.ended(worker.name, message.task_id, now, gives_slot=False)
                if queued is not None:
                    self._update_cache(queued.task, message.failure)
                    self._events.append(message)
            case _:
                name = type(message).__name__
                raise ProtocolError(f"{name} from a {worker.spec.role} worker, {worker.state}")

    def _on_done(self, worker: ManagedProcess, load: WorkerLoad, message: Done, now: float) -> None:
        answered = load.tasks.get(message.task_id)
        if answered is None or self._spool is None:
            raise ProtocolError(f"`task_id` {message.task_id} is not a task of this worker")
        validate_reply(message, answered.task, answered.slot, self._spool.folder)
        result = message.result
        gives = isinstance(result, Decoded) and bool(result.parts)
        queued = self._scheduler.ended(worker.name, message.task_id, now, gives_slot=gives)
        if queued is not None:
            self._update_cache(queued.task, result)
            self._events.append(message)
        elif isinstance(result, Fetched):
            self._spool.remove(result.path)

    def _update_cache(self, task: Task, outcome: Result | Failure) -> None:
        """Tell the cache worker the outcome of a file, unless it lags behind."""
        cache = self._supervisor.workers.get("cache-0")
        if cache is None or cache.channel is None or cache.state != "ready":
            return
        update = CacheUpdate.of(task, outcome)
        if update is not None and not cache.channel.unsent:
            self._supervisor.send(cache, update)

    def _launch(self, spec: WorkerSpec) -> Launch:
        if self._spool is not None:
            self._spool.restore()
        in_slots = spec.role in ("decode", "extract")
        return Launch(
            run=self._roles[spec.role],
            role=spec.role,
            name=spec.name,
            settings=without_credentials(self._settings, spec.role).model_dump_json(),
            device="cuda:0" if spec.device.startswith("cuda:") else spec.device,
            extractors=spec.extractors,
            threads=spec.threads,
            arena=self._arena if in_slots else -1,
            slots=self._settings.workers.slots if in_slots else 0,
            slot_bytes=self._slot_bytes if in_slots else 0,
            spool=str(self._spool.folder) if self._spool and spec.role == "fetch" else "",
            expected=packed(self.fingerprints) if self._has_worked and spec.role == "fuse" else "",
            shadow=self._shadow and spec.role == "fuse" and not self._trial_ended,
        )

    def _on_ready(self, worker: ManagedProcess, message: Ready, now: float) -> None:
        try:
            unpacked(message.info.get("fingerprints", "{}"))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"`fingerprints` cannot be read: {error}") from error
        worker.became_ready(message.info, now)
        _log.info("workers.ready", worker=worker.name)
        everyone = list(self._supervisor.workers.values())
        if self.ready:
            if self._fits():
                self._admit(worker)
        elif all(each.state == "ready" for each in everyone) and self._fits():
            for each in everyone:
                self._admit(each)
            self.ready = self._has_worked = True
            self._events.append(PoolReady())

    def _fits(self) -> bool:
        """Check that the extractors agree and the bundle was made for them; refuse if not.

        Checked again for every replaced worker: weights and bundles may change on disk meanwhile.
        """
        by_role: dict[WorkerRole, list[Mapping[str, str]]] = {"extract": [], "fuse": []}
        for worker in self._supervisor.workers.values():
            by_role.setdefault(worker.spec.role, []).append(worker.info)
        try:
            self._by_extractor = extractor_fingerprints(by_role["extract"])
        except ConfigError as error:
            self._refuse(str(error))
            return False
        self.fingerprints = stream_fingerprints(self._settings.features, self._by_extractor)
        made_for = extractor_fingerprints(by_role["fuse"])
        wrong = mismatch(made_for, self.fingerprints)
        if wrong is not None:
            self._refuse(f"fusion.bundle {self._settings.fusion.bundle}: {wrong}")
        return wrong is None

    def _admit(self, worker: ManagedProcess) -> None:
        spec = worker.spec
        if spec.role == "cache":
            self._supervisor.send(worker, Expect(packed(self._by_extractor)))
        load = WorkerLoad(spec.name, spec.queues, spec.at_most, spec.limit_s)
        load.at_once = spec.role == "fetch"  # it has a thread for each task that it may hold
        load.on_cpu = spec.device == "cpu"
        self._scheduler.add(load)
        if spec.role == "fuse":
            self._supervisor.send(worker, Expect(packed(self.fingerprints)))
            if "name" in worker.info:
                version = worker.info.get("version", "")
                self._on_bundle(BundleLoaded(worker.info["name"], version))

    def _on_bundle(self, loaded: BundleLoaded) -> None:
        if self._trial_ended:
            loaded = msgspec.structs.replace(loaded, shadow_refused=_TRIAL_ENDED)
        before, self._loaded = self._loaded, loaded
        if before is not None and before != loaded:
            self._events.append(loaded)

    def _refuse(self, message: str, *, mistake: bool = True) -> None:
        if self.refused is None:
            self.refused, self.ready = message, False
            self._events.append(PoolRefused(message, mistake and not self._has_worked))
            _log.error("workers.refused", reason=message)


def extractor_fingerprints(infos: Iterable[Mapping[str, str]]) -> dict[Stream, str]:
    """Return the fingerprints of one role's workers; ConfigError where they differ."""
    by_extractor: dict[Stream, str] = {}
    for info in infos:
        for name, fingerprint in unpacked(info.get("fingerprints", "{}")).items():
            known = by_extractor.setdefault(name, fingerprint)
            if known != fingerprint:
                raise ConfigError(
                    f"extractor {name} differs between workers: {known} and {fingerprint}"
                    f"{differing(known, fingerprint)}"
                )
    return by_extractor
