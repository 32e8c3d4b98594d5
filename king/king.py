"""The King: builds the threads, watches them, and ends them in order.

    main      signals, health file, the end
    broker    `king.broker_thread`    owns the connection: drains, heartbeats, acknowledgements
    store     `king.store_thread`     owns the database: claims, outcomes, leases, retries
    dispatch  `king.dispatch_thread`  owns the worker pool: plans, deadlines

    broker --delivery--> store --begun post--> dispatch --outcome--> store --ack--> broker

Every arrow is a deque bounded by ``broker.prefetch``: a message is held until its outcome is
written, so a queue that is full downstream stops intake and never heartbeats. Only as many
messages begin as files can be in work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog

from common.errors import ConfigError, RetryableError, TaggingError, one_line
from common.urls import redact
from config.settings import Settings
from king.broker.base import Broker, Prefetch, Waker
from king.broker.connect import open_broker
from king.broker_thread import BrokerThread
from king.dispatch_thread import DispatchThread
from king.jobs import PostStore, is_dead, own_name
from king.status import IDLE_TICK_S, Status, dumped_on_signal, write_health
from king.store.client import StoreClient
from king.store.store import Store
from king.store_thread import InFlight, Room, StoreInbox, StoreThread
from workers.protocol import TaskPool

if TYPE_CHECKING:
    from king.metrics import KingMetrics
    from king.traces import Traces

# The watchdog sends it: connect to the broker and subscribe again.
SUBSCRIBE_SIGNAL = signal.SIGUSR1
# How late a change of the King's state is noticed while it starts or ends; less only burns CPU.
_TICK_S = 0.1
# The watchdog and `insighttag status` judge progress by this file, in steps of seconds.
_HEALTH_EVERY_S = 1.0
# A drain ends when all has been quiet for this long. A retry that is being published is in neither
# the queue nor the database's open jobs for a moment; at half, a slow broker could hide it.
_CONFIRM_S = 2.0
# Time for writing and acknowledging what a drain has broken off; supervisors wait longer than that.
_FLUSH_S = 10.0
# The same after a second signal: someone wants it to stop at once.
_HURRY_S = 2.0

log = structlog.get_logger()


class King:
    """One daemon; `run` does everything."""

    def __init__(
        self,
        settings: Settings,
        *,
        pool: TaskPool | None = None,
        store: PostStore | None = None,
        broker: Broker | None = None,
        owner: str | None = None,
    ) -> None:
        """Describe the King; starts nothing. Its parts default to the real ones.

        ``embedded://`` URLs of the settings are resolved; ``owner`` names this King in the jobs.
        """
        self._settings = settings
        self.in_flight = InFlight()
        owner = owner or own_name()
        self._metrics = _metrics(settings, self._snapshot)
        self._traces = _traces(settings, owner)
        self.status = Status(on_end=[it.ended for it in (self._metrics, self._traces) if it])
        inbox = StoreInbox(self.in_flight)
        if broker is None:
            prefetch = Prefetch.of(settings.broker, settings.media_in_work)
            broker = open_broker(settings.broker, prefetch)
        self._broker_thread = BrokerThread(
            broker,
            self.status,
            inbox.deliver,
        )
        self._dispatch_thread = DispatchThread(
            pool if pool is not None else _real_pool(settings),
            settings,
            self.status,
            inbox.finish,
        )
        self._store_thread = StoreThread(
            store if store is not None else Store(StoreClient(settings.store)),
            inbox,
            settings.king,
            owner=owner,
            is_dead=is_dead,
            status=self.status,
            in_flight=self.in_flight,
            broker_thread=self._broker_thread,
            start=self._dispatch_thread.start,
            batch_size=settings.store.batch_size,
            room=Room.around(broker.prefetch.with_media, broker.prefetch.least),
        )
        self._threads: dict[str, threading.Thread] = {}
        self._died: tuple[str, BaseException] | None = None
        self._signals = 0
        self._waker = Waker()
        self._health_due = 0.0
        self._waits_for = ""
        self._health_failed = False
        self._empty_since: float | None = None

    def stop(self) -> None:
        """Ask for a drain; a second call ends the King at once."""
        self._signals += 1
        self._waker.wake()

    def run(self, *, drain: bool = False) -> int:
        """Serve until stopped, or with ``drain`` until there is no work left; return the exit code.

        Raises ConfigError when the workers, the broker or the database refuse the configuration, or
        the address of the metrics is taken.
        Once it has served, the configuration was right: whatever ends it then may pass, and 1 lets
        the supervisor start it again.
        """
        with self._signals_caught(), self._metrics_served(), self._traces_sent():
            self._start()
            self._serve(drain)
            self._shut_down()
        served = self.status.has_served
        if self._died is not None:
            name, error = self._died
            if isinstance(error, TaggingError):  # said in one line, where a bug has a traceback
                is_mistake = isinstance(error, ConfigError) and not served
                raise error if is_mistake else RetryableError(one_line(error)) from error
            log.error("king.thread_died", thread=name, exc_info=error)
            return 1
        if (refused := self.status.refused) is not None:
            kind = ConfigError if refused.mistake and not served else RetryableError
            raise kind(refused.message)
        log.info("king.stopped", tagged=self.status.counter("tagged"))
        return 0

    def _start(self) -> None:
        log.info("king.started", pid=os.getpid(), queue=self._settings.broker.queue)
        self._spawn("store", self._store_thread.run)
        self._spawn("broker", self._broker_thread.run)
        self._spawn("dispatch", self._dispatch_thread.run)

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - the King ends, and says why
                if self._died is None:
                    self._died = (name, error)
                self._waker.wake()

        self._threads[name] = threading.Thread(target=run, name=f"king-{name}", daemon=True)
        self._threads[name].start()

    @property
    def _broken(self) -> bool:
        return self._died is not None or self.status.refused is not None

    def _serve(self, drain: bool) -> None:
        while not self._signals and not self._broken:
            # A King that serves has only its health to write: signals and dead threads wake it.
            self._tick(_TICK_S if drain or not self.status.has_served else IDLE_TICK_S)
            if drain and self._nothing_left():
                log.info("king.drained", tagged=self.status.counter("tagged"))
                return
            if drain and sys.stderr.isatty():
                self._show_progress()
        if drain and sys.stderr.isatty():
            sys.stderr.write("\n")

    def _tick(self, wait_s: float = _TICK_S) -> None:
        self._waker.wait(wait_s)  # not an Event: a signal handler could not set it safely
        self.status.tick("main")
        if time.monotonic() >= self._health_due:
            self._health_due = time.monotonic() + _HEALTH_EVERY_S
            self._write_health()
            self._say_waiting()

    def _snapshot(self) -> dict[str, Any]:
        return self.status.snapshot(
            in_flight=len(self.in_flight), oldest_in_flight_s=self.in_flight.oldest_s
        )

    def _metrics_served(self) -> contextlib.AbstractContextManager[None]:
        address = self._settings.king.metrics
        if self._metrics is None or address is None:
            return contextlib.nullcontext()
        return self._metrics.served(address)

    def _traces_sent(self) -> contextlib.AbstractContextManager[None]:
        return self._traces.sent() if self._traces is not None else contextlib.nullcontext()

    def _write_health(self) -> None:
        try:
            write_health(self._settings.king.health_file, self._snapshot())
            self._health_failed = False
        except OSError as error:
            if not self._health_failed:
                self._health_failed = True
                log.warning("king.health_file_failed", error=str(error))

    def _say_waiting(self) -> None:
        """Log which server the King waits for: its client only says so after its own timeouts."""
        urls = {"store_down": self._settings.store.url, "broker_down": self._settings.broker.url}
        url = redact(urls.get(self.status.phase, ""))
        if url and url != self._waits_for:
            log.warning("king.waiting", url=url, until="it answers")
        self._waits_for = url

    def _nothing_left(self) -> bool:
        """Return True when no message, no post in flight and no retry has been seen for a while."""
        now = time.monotonic()
        busy = len(self.in_flight) or not self._store_thread.idle or self.status.phase != "serving"
        if busy:
            self._empty_since = None
            return False
        if self._empty_since is None:
            self._empty_since = now
        for answer in (self.status.queue_depth, self.status.open_jobs):
            # Both must have been asked since then; an older answer may be out of date.
            if answer is None or answer[1] < self._empty_since:
                return False
            if answer[0]:
                self._empty_since = None
                return False
        return now - self._empty_since >= _CONFIRM_S

    def _show_progress(self) -> None:
        status = self.status
        depth = status.queue_depth[0] if status.queue_depth else "?"
        sys.stderr.write(
            f"\r{status.phase}: {status.counter('tagged')} tagged, "
            f"{status.counter('failed')} failed, "
            f"{len(self.in_flight)} in flight, {depth} queued\x1b[K"
        )
        sys.stderr.flush()

    def _shut_down(self) -> None:
        """Finish the posts in flight, put the others back, and end the threads."""
        self.status.draining = True
        log.info("king.draining", in_flight=len(self.in_flight))
        self._broker_thread.stop_consuming()
        self._store_thread.drain()
        if self._broken and not self.status.store_up.is_set():
            self._store_thread.leave()  # nothing has begun that a database would have to be told
        limit_s = self._settings.king.drain_timeout_s
        if not self._wait(limit_s, self._landed):
            log.warning("king.drain_timed_out", in_flight=len(self.in_flight))
            self._dispatch_thread.give_back()
            flush_s = _FLUSH_S if self._signals < 2 else _HURRY_S
            self._wait(flush_s, self._given_back, hurry=True)
        self._store_thread.leave()
        self._store_thread.stop()
        self._join("store")
        self._broker_thread.stop()
        self._dispatch_thread.stop()
        self._join("broker")
        self._join("dispatch", self._settings.workers.shutdown_timeout_s)
        self.status.stopped = True
        self._write_health()

    def _landed(self) -> bool:
        return len(self.in_flight) == 0 and self._store_thread.idle and self._broker_thread.quiet

    def _given_back(self) -> bool:
        """Return True when all is released, or cannot be while the database is away."""
        return self._landed() or not self.status.store_up.is_set()

    def _wait(self, timeout_s: float, done: Callable[[], bool], *, hurry: bool = False) -> bool:
        """Wait for ``done``; give up when a thread is dead or a second stop was requested."""
        end = time.monotonic() + timeout_s
        while not done():
            if self._broken or time.monotonic() > end or (self._signals > 1 and not hurry):
                return False
            self._tick()
        return True

    def _join(self, name: str, timeout_s: float = 0.0) -> None:
        thread = self._threads[name]
        if name == "store" and not self.status.store_up.is_set():
            # It waits for a database that is away, and leaves when that call returns: what it
            # held is not acknowledged.
            thread.join(_HURRY_S)
            return
        thread.join(timeout_s + _FLUSH_S)
        if thread.is_alive():
            log.error("king.thread_stuck", thread=name)

    @contextlib.contextmanager
    def _signals_caught(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT: drain; SIGUSR1: subscribe again; SIGUSR2: write the stacks."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        def subscribe_anew(_number: int, _frame: FrameType | None) -> None:
            self._broker_thread.subscribe_anew()

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, SUBSCRIBE_SIGNAL: subscribe_anew}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            with dumped_on_signal(self._settings.king.health_file):
                yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _metrics(settings: Settings, snapshot: Callable[[], Mapping[str, Any]]) -> KingMetrics | None:
    if settings.king.metrics is None:
        return None
    from king.metrics import KingMetrics  # 80 ms of CPU, and an HTTP server

    return KingMetrics(snapshot)


def _traces(settings: Settings, owner: str) -> Traces | None:
    if settings.traces.endpoint is None:
        return None
    from king.traces import Traces  # its SDK is an extra

    return Traces(settings.traces, owner)


def _real_pool(settings: Settings) -> TaskPool:
    from workers.pool.pool import ProcessPool

    return ProcessPool(settings, shadow=True)
