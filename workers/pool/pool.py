"""The King's side of the workers: one event loop, driven by `ProcessPool.poll`.

It keeps four promises: each task ends in exactly one event unless it is cancelled, nothing it
does can block on a worker, a slot is never lost, and no process outlives it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping

import structlog

from common.errors import ConfigError, RetryableError, WorkerDied
from config.settings import ExtractorName, Settings
from extractors.parts import slot_bytes
from workers.cache.notes import update_of
from workers.fetch.spool import Spool
from workers.pool.arena import create_arena
from workers.pool.checks import check_message, check_result
from workers.pool.events import (
    BundleChanged,
    PoolEvent,
    PoolReady,
    PoolRefused,
    TaskDone,
    TaskFailed,
    TaskPool,
    WorkerView,
)
from workers.pool.fingerprints import (
    bundle_fingerprints,
    expectation,
    expected_fingerprints,
    known_extractors,
    mismatch,
)
from workers.pool.launch import ROLES, Launch, WorkerSpec, without_credentials, worker_specs
from workers.pool.member import Member
from workers.pool.pipe import PipeBroken
from workers.pool.schedule import Entry, Load, Scheduler
from workers.pool.supervisor import TICK_S, Crew, Gone, Report
from workers.protocol import (
    Began,
    BundleLoaded,
    CacheLookup,
    Decoded,
    Done,
    Failed,
    Failure,
    Fetched,
    Ready,
    Refused,
    Reply,
    Result,
    Stream,
    Task,
    WorkerRole,
)

__all__ = [
    "BundleChanged",
    "PoolEvent",
    "PoolReady",
    "PoolRefused",
    "ProcessPool",
    "TaskDone",
    "TaskFailed",
    "TaskPool",
    "WorkerView",
]

_log = structlog.get_logger()

_FALSE_STARTS = 3
RECALL_S = 2.0
"""A look-up in the cache may wait so long, beyond its own limit, before the post goes on."""


class ProcessPool:
    """`workers.pool.events.TaskPool` on real processes.

    All but `wake` are for one thread, and that thread must live as long as the pool.

    Attributes:
        ready: Every worker has been ready once, and none has refused.
        refused: Why the pool cannot work.
        bundle: Name and version of the bundle that is served.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        roles: Mapping[WorkerRole, str] = ROLES,
        grace_s: float = 5.0,
        fuse: bool = True,
        extractors: Collection[ExtractorName] | None = None,
    ) -> None:
        """Describe the pool; starts nothing.

        Args:
            settings: Which workers, and their limits.
            roles: Role ─► ``module:function``; only tests pass another.
            grace_s: A begun task runs at least this long before its deadline kills its worker.
            fuse: Whether there is a fusion worker; without one, no bundle is needed.
            extractors: Only these are loaded; None: all.
        """
        self._settings = settings
        self._roles = roles
        self._slot_bytes = slot_bytes(settings)
        self._scheduler = Scheduler(settings, grace_s=grace_s)
        self._crew = Crew(
            worker_specs(settings, fuse=fuse, extractors=extractors),
            self._launch,
            start_timeout_s=settings.workers.start_timeout_s,
        )
        self._events: list[PoolEvent] = []
        self._arena = -1
        self._spool: Spool | None = None
        self._stopped = False
        self._next_tick = 0.0
        self._expected: Mapping[Stream, str] = {}
        self.ready = False
        self.refused: str | None = None
        self.bundle: tuple[str, str] | None = None

    @property
    def workers(self) -> list[WorkerView]:
        """Every worker, in a fixed order."""
        return [m.view(self._scheduler.load(m.name)) for m in self._crew.members.values()]

    @property
    def fingerprints(self) -> Mapping[Stream, str]:
        """Stream ─► fingerprint of the features that the extractors give, once ready."""
        return self._expected

    # The caller's side ------------------------------------------------------------------------

    def start(self) -> None:
        """Start every worker; returns at once.

        Raises:
            ConfigError: The spool folder cannot be used.
        """
        self._spool = Spool(self._settings.fetch.spool)
        self._arena = create_arena(self._slot_bytes * self._settings.workers.slots)
        self._crew.on_time(time.monotonic(), restart=True)

    def submit(self, task: Task, *, deadline: float, priority: int = 0) -> int:
        """Queue a task; it is sent in the next `poll`.

        Raises:
            ValueError: It refers to a slot that is not the caller's (any more).
        """
        if isinstance(task, CacheLookup):  # a post does not wait for a cache
            deadline = min(deadline, time.monotonic() + RECALL_S + self._settings.cache.timeout_s)
        return self._scheduler.submit(task, deadline, priority)

    def cancel(self, task_id: int) -> None:
        """Forget a task; one that has ended, or never was, is no mistake.

        An event that `poll` has returned before stays the caller's, with its slot and file.
        """
        self._scheduler.cancel(task_id)

    def release(self, slot: int) -> None:
        """Say, once, that no more tasks will refer to a decoded slot.

        Raises:
            ValueError: The slot is not the caller's (any more).
        """
        self._scheduler.slots.release(slot)

    def wake(self) -> None:
        """Interrupt `poll`; from any thread, and also when the pool has stopped."""
        self._crew.wake()

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Drive the pool; returns with the first events, when woken, or after ``timeout_s``."""
        end = time.monotonic() + timeout_s
        while not self._stopped:
            now = time.monotonic()
            self._crew.on_time(now, restart=self.refused is None)
            if now >= self._next_tick:
                self._next_tick = now + TICK_S
                self._enforce_deadlines(now)
            self._dispatch(now)
            until = min(end, self._crew.next_timer())
            if self._scheduler.busy:
                until = min(until, self._next_tick)
            urgent = self._events or self._crew.woken
            for report in self._crew.collect(0.0 if urgent else max(0.0, until - now)):
                self._on_report(report)
            now = time.monotonic()
            if self._events or self._crew.woken or now >= end:
                self._dispatch(now)  # the workers go on while the caller reads the events
                break
        self._crew.woken = False
        events, self._events = self._events, []
        return events

    def stop(self, timeout_s: float) -> None:
        """Let workers finish what they have begun, then kill what is left; forgets all tasks."""
        if self._stopped:
            return
        self._stopped, self.ready = True, False
        self._crew.stop(timeout_s)
        if self._arena >= 0:
            os.close(self._arena)
            self._arena = -1
        if self._spool is not None:
            self._spool.close()

    # Tasks ------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        if self.ready:
            for name, envelope in self._scheduler.dispatch(now):
                self._crew.send(self._crew.members[name], envelope)
            for entry in self._scheduler.strand("recall"):
                self._fail(entry, RetryableError, "the cache worker is away", None)

    def _enforce_deadlines(self, now: float) -> None:
        overdue = self._scheduler.overdue(now)
        for entry in overdue.failed:
            if entry.batch:
                self._fail(entry, WorkerDied, f"{entry.lane} ran past its deadline", entry.holder)
            else:
                self._fail(entry, RetryableError, f"{entry.lane} waited past its deadline", None)
        for name, task_ids in overdue.kill.items():
            member = self._crew.members[name]
            if member.kill_for is None:
                _log.error("workers.killed_overdue", worker=name, tasks=len(task_ids))
                member.kill_for = task_ids
                self._crew.kill(member)

    def _fail(
        self, entry: Entry, error: type[RetryableError], message: str, worker: str | None
    ) -> None:
        failure = Failure(entry.stage, error.__name__, message, retryable=True)
        self._events.append(TaskFailed(entry.task_id, failure, worker or ""))

    # Reports ----------------------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        member = report.member
        if isinstance(report, Gone):
            self._on_gone(report)
            return
        try:
            self._on_message(member, report.message)
        except PipeBroken as error:
            _log.error("workers.bad_message", worker=member.name, error=str(error))
            self._crew.kill(member)

    def _on_gone(self, gone: Gone) -> None:
        member = gone.member
        load = self._scheduler.load(member.name)
        answered = load.done if load else 0
        begun = [i for i, entry in load.held.items() if entry.batch] if load else []
        charged = self._scheduler.died(member.name, member.kill_for)
        for entry in charged:
            late = member.kill_for is not None and entry.task_id in member.kill_for
            what = "ran past its deadline" if late else f"died ({gone.how})"
            self._fail(entry, WorkerDied, f"worker {member.name} {what}", member.name)
        if member.spec.role == "fetch" and self._spool is not None:
            self._spool.remove_of(begun)
        if member.state == "refused" or self._stopped:
            return
        planned = gone.status == 0 and answered > 0 and not begun
        again_s = member.died(time.monotonic(), answered=answered, planned=planned)
        event = _log.info if planned else _log.warning
        event("workers.ended", worker=member.name, how=gone.how, again_s=again_s)
        if member.false_starts >= _FALSE_STARTS:
            times = f"failed to start {_FALSE_STARTS} times"
            self._refuse(f"worker {member.name} {times} ({gone.how}); its log says why")

    def _on_message(self, member: Member, message: Reply) -> None:
        check_message(message)
        now = time.monotonic()
        if isinstance(message, Ready) and member.state == "starting":
            self._on_ready(member, message, now)
        elif isinstance(message, Refused) and member.state == "starting":
            member.state = "refused"
            self._refuse(message.message)
        elif isinstance(message, BundleLoaded) and member.spec.role == "fuse":
            self._on_bundle(message.name, message.version)
        elif self._scheduler.load(member.name) is None:
            raise PipeBroken(f"{type(message).__name__} before it was given anything")
        elif isinstance(message, Began):
            self._scheduler.began(member.name, message.task_ids, now)
        elif isinstance(message, Done):
            self._on_done(member, message, now)
        elif isinstance(message, Failed):
            entry = self._scheduler.ended(member.name, message.task_id, now, gives_slot=False)
            if entry is not None:
                self._remember(entry.task, message.failure)
                self._events.append(TaskFailed(entry.task_id, message.failure, member.name))
        else:
            raise PipeBroken(f"unexpected {type(message).__name__}")

    def _on_done(self, member: Member, message: Done, now: float) -> None:
        load, result = self._scheduler.load(member.name), message.result
        held = load.held.get(message.task_id) if load else None
        if held is None or self._spool is None:
            raise PipeBroken("an answer to nothing")
        check_result(held, result, self._spool.folder)
        gives = isinstance(result, Decoded) and bool(result.parts)
        entry = self._scheduler.ended(member.name, message.task_id, now, gives_slot=gives)
        if entry is not None:
            self._remember(entry.task, result)
            done = TaskDone(entry.task_id, result, message.seconds, member.name)
            self._events.append(done)
        elif isinstance(result, Fetched):
            self._spool.remove(result.path)

    def _remember(self, task: Task, outcome: Result | Failure) -> None:
        """Let the cache worker keep what was learnt of a file; one that lags behind is not told."""
        cache = self._crew.members.get("cache-0")
        if cache is None or cache.process is None or cache.state != "ready":
            return
        note = update_of(task, outcome)
        if note is not None and not cache.process.pipe.unsent:
            self._crew.send(cache, note)

    # Readiness --------------------------------------------------------------------------------

    def _launch(self, spec: WorkerSpec) -> Launch:
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
        )

    def _on_ready(self, member: Member, message: Ready, now: float) -> None:
        member.became_ready(message.info, now)
        _log.info("workers.ready", worker=member.name)
        everyone = list(self._crew.members.values())
        if self.ready:
            if self._fits():
                self._admit(member)
        elif all(each.state == "ready" for each in everyone) and self._fits():
            for each in everyone:
                self._admit(each)
            self.ready = True
            self._events.append(PoolReady())

    def _fits(self) -> bool:
        """Whether the extractors agree and the bundle was made for them; refuses if not.

        Asked again of every replaced worker: weights and bundles may change on disk meanwhile.
        """
        members = self._crew.members.values()
        try:
            self._expected = expected_fingerprints(
                self._settings.features, [m.info for m in members if m.spec.role == "extract"]
            )
        except ConfigError as error:
            self._refuse(str(error))
            return False
        made_for = [bundle_fingerprints(m.info) for m in members if m.spec.role == "fuse"]
        wrong = mismatch(made_for[0], self._expected) if made_for else None
        if wrong is not None:
            self._refuse(f"fusion.bundle {self._settings.fusion.bundle}: {wrong}")
        return wrong is None

    def _admit(self, member: Member) -> None:
        spec = member.spec
        if spec.role == "cache":
            infos = [m.info for m in self._crew.members.values() if m.spec.role == "extract"]
            self._crew.send(member, known_extractors(infos))
        self._scheduler.add(Load(spec.name, spec.lanes, spec.at_most, spec.limit_s))
        if spec.role == "fuse":
            self._crew.send(member, expectation(self._expected))
            if "name" in member.info:
                self._on_bundle(member.info["name"], member.info.get("version", ""))

    def _on_bundle(self, name: str, version: str) -> None:
        before, self.bundle = self.bundle, (name, version)
        if before is not None and before != self.bundle:
            self._events.append(BundleChanged(name, version))

    def _refuse(self, message: str) -> None:
        if self.refused is None:
            self.refused, self.ready = message, False
            self._events.append(PoolRefused(message))
            _log.error("workers.refused", reason=message)
