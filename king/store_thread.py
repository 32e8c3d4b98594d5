"""The store thread: it alone touches the database.

Deliveries come in, are claimed in batches and go on to the dispatch thread; outcomes come back,
are written in batches, and only then are their messages acknowledged. While the database is away
the same batch is written again and again: nothing is acknowledged, so the broker stops giving.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import structlog

from common.errors import MessageError, StoreRefused, StoreUnavailable
from common.retry import reconnect_delay_s
from config.settings import KingSettings
from king import report
from king.broker.base import Delivery
from king.broker_thread import BrokerThread
from king.in_flight import InFlight
from king.jobs import (
    Claim,
    ClaimContext,
    Dead,
    HeldElsewhere,
    Outcome,
    Rejected,
    Released,
    Retry,
    Started,
    Tagged,
    Unreadable,
    Verdict,
    WriteRefused,
)
from king.messages import PostMessage, parse_message
from king.reconciler import Reconciler
from king.status import Status
from king.store.store import Store
from workers.protocol import Failure

T = TypeVar("T")

_WAIT_S = 0.25
_SECOND_S = 1.0
_RELEASE_AFTER_S = 10.0  # by then a broker has delivered a dead King's messages again
_MAX_PARKED_S = 2.0
_REFUSED_AGAIN_S = 10.0  # a job that the database refused is written again
_PAYLOAD_CHARS = 4096

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Refused:
    """A message that could not be read, and its delivery."""

    outcome: Unreadable
    delivery: Delivery


_Item = Claim | Outcome | _Refused


class StoreThread:
    """Claims posts, writes outcomes, renews leases, publishes what is due."""

    def __init__(
        self,
        store: Store,
        settings: KingSettings,
        *,
        owner: str,
        is_dead: Callable[[str], bool],
        status: Status,
        in_flight: InFlight,
        batch_size: int,
    ) -> None:
        self._store = store
        self._settings = settings
        self._status = status
        self._in_flight = in_flight
        self._batch_size = batch_size
        self._terms = ClaimContext(
            owner=owner,
            bundle=("", ""),
            now=0.0,
            lease_s=settings.lease_s,
            attempts=settings.attempts,
            is_dead=is_dead,
        )
        self._reconciler = Reconciler(store, settings.reconcile_s, batch_size)
        self._broker_thread: BrokerThread | None = None
        self._start: Callable[[Started], None] | None = None
        self._inbox: deque[_Item] = deque()
        self._arrived = threading.Condition()
        self._parked: list[tuple[float, Claim]] = []
        self._unwritten: list[tuple[float, Outcome | _Refused]] = []
        self._running: set[str] = set()
        self._publishing = False
        self._published: deque[tuple[list[str], ClaimContext]] = deque()
        self._draining = False
        self._busy = False
        self._leaving = threading.Event()
        self._stopping = threading.Event()
        self._second_due = self._renew_due = 0.0
        self._release_due: float | None = None

    def wire(self, broker_thread: BrokerThread, start: Callable[[Started], None]) -> None:
        """Connect the neighbours: where acknowledgements and begun posts go."""
        self._broker_thread, self._start = broker_thread, start

    # For the other threads -------------------------------------------------------------------

    def take(self, delivery: Delivery) -> None:
        """A message has arrived (broker thread); its number is bounded by ``broker.prefetch``."""
        payload = delivery.body.decode("utf-8", "backslashreplace")[:_PAYLOAD_CHARS]
        try:
            message = parse_message(delivery.body)
        except MessageError as error:
            outcome = Unreadable(payload, Failure.of("message", error))
            self._put(_Refused(outcome, delivery))
            return
        if self._in_flight.add(message.post_id, delivery):
            self._put(Claim(message, payload, delivery.redelivered))

    def finish(self, outcome: Outcome) -> None:
        """An attempt has ended (dispatch thread)."""
        self._put(outcome)

    def drain(self) -> None:
        """Begin no more posts: what has not begun goes back to the broker."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """Nothing waits to be begun or written."""
        waits = self._parked or self._unwritten
        return not (self._inbox or self._busy or waits or self._publishing)

    def leave(self) -> None:
        """Stop waiting for a database that is away (a drain has run out of time)."""
        self._leaving.set()

    def stop(self) -> None:
        """Let `run` return once the inbox is empty."""
        self._stopping.set()

    def _put(self, item: _Item) -> None:
        with self._arrived:
            self._inbox.append(item)
            self._arrived.notify()

    # The thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`."""
        self._persist(self._store.connect)
        try:
            while not (self._stopping.is_set() and not self._inbox):
                self._round(self._next_batch())
        finally:
            self._store.close()

    def _next_batch(self) -> list[_Item]:
        with self._arrived:
            if not self._inbox and not self._stopping.is_set():
                self._arrived.wait(_WAIT_S)
            # Said under the lock, so that no item is ever in neither place.
            self._busy = bool(self._inbox)
            return [self._inbox.popleft() for _ in range(min(len(self._inbox), self._batch_size))]

    def _round(self, batch: Sequence[_Item]) -> None:
        self._status.tick("store")
        # Outcomes first: they end what the claims might wait for.
        ended = [item for item in batch if not isinstance(item, Claim)]
        self._write([*self._due_again(), *ended])
        self._begin([item for item in batch if isinstance(item, Claim)])
        self._busy = False
        if not self._stopping.is_set() and not self._leaving.is_set():
            self._look_after()

    def _now(self) -> ClaimContext:
        return replace(
            self._terms, now=round(time.time(), 3), bundle=self._status.bundle or ("", "")
        )

    def _persist(self, work: Callable[[], T]) -> T | None:
        """Do work on the store until it is done; None when it is refused, or the King leaves."""
        failures = 0
        while True:
            try:
                result = work()
            except StoreRefused as error:
                log.warning("king.write_refused", error=str(error))
                return None
            except StoreUnavailable as error:
                failures += 1
                self._status.store_up.clear()
                delay_s = reconnect_delay_s(failures)
                log.warning(
                    "king.store_unreachable",
                    url=self._store.url,
                    error=str(error),
                    retry_in_s=round(delay_s, 2),
                )
                self._status.tick("store")
                if self._leaving.wait(delay_s):
                    return None
                continue
            if failures:
                log.info("king.store_reached", url=self._store.url)
            self._status.store_up.set()
            return result

    # Begin -----------------------------------------------------------------------------------

    def _begin(self, claims: list[Claim]) -> None:
        now = time.time()
        due = [claim for until, claim in self._parked if until <= now or self._draining]
        self._parked = [] if self._draining else [p for p in self._parked if p[0] > now]
        claims += due
        if not claims:
            return
        if self._draining:
            for claim in claims:
                self._requeue(claim.message.post_id)
            return
        context = self._now()
        verdicts = self._persist(lambda: self._store.begin(claims, context))
        if verdicts is None:
            return
        for claim, verdict in zip(claims, verdicts, strict=True):
            self._act(claim, verdict)

    def _act(self, claim: Claim, verdict: Verdict) -> None:
        post_id = claim.message.post_id
        if isinstance(verdict, Started):
            self._running.add(post_id)
            if self._start is not None:
                self._start(verdict)
        elif isinstance(verdict, HeldElsewhere):
            # Looked at again soon: its King may finish or die long before its lease ends.
            until = min(verdict.until, time.time() + _MAX_PARKED_S)
            self._parked.append((until, claim))
        elif isinstance(verdict, WriteRefused):
            report.unrecorded(verdict, _REFUSED_AGAIN_S)
            self._in_flight.touch(post_id)
            self._parked.append((time.time() + _REFUSED_AGAIN_S, claim))
        else:
            if isinstance(verdict, Rejected):
                self._status.count("failed")
                self._status.count("dead")
                report.buried(verdict)
            else:
                self._status.count("settled")
                report.settled(verdict)
            self._ack(post_id)

    # Write -----------------------------------------------------------------------------------

    def _write(self, items: Sequence[Outcome | _Refused]) -> None:
        if not items:
            return
        outcomes = [item.outcome if isinstance(item, _Refused) else item for item in items]
        context = self._now()
        recorded = self._persist(lambda: self._store.finish(outcomes, context))
        if recorded is None:
            return
        for item, outcome in zip(items, recorded, strict=True):
            if isinstance(outcome, WriteRefused):
                self._hold(item, outcome)
            elif isinstance(item, _Refused):
                self._status.count("dead")
                report.unreadable(item.outcome)
                self._send_ack([item.delivery])
            elif not isinstance(outcome, Unreadable):
                self._close(outcome)

    def _hold(self, item: Outcome | _Refused, refused: WriteRefused) -> None:
        """Its job was refused: written again later; its message stays unacknowledged."""
        report.unrecorded(refused, _REFUSED_AGAIN_S)
        if not self._draining:
            self._in_flight.touch(refused.post_id)
            self._unwritten.append((time.time() + _REFUSED_AGAIN_S, item))
        elif not isinstance(item, _Refused):
            self._running.discard(refused.post_id)
            self._requeue(refused.post_id)
        elif self._broker_thread is not None:
            self._broker_thread.requeue([item.delivery])

    def _due_again(self) -> list[Outcome | _Refused]:
        """Outcomes whose jobs were refused, to be written once more; at a drain all of them."""
        held, now = self._unwritten, time.time()
        due = [item for until, item in held if until <= now or self._draining]
        self._unwritten = [] if self._draining else [pair for pair in held if pair[0] > now]
        return due

    def _close(self, outcome: Tagged | Retry | Dead | Released) -> None:
        post_id = outcome.started.post_id
        self._running.discard(post_id)
        if isinstance(outcome, Released):
            self._requeue(post_id)
            return
        if isinstance(outcome, Tagged):
            self._status.count("tagged")
        elif isinstance(outcome, Retry):
            self._status.count("retried")
        else:
            self._status.count("failed")
            self._status.count("dead")
        report.finished(outcome)
        self._ack(post_id)

    def _ack(self, post_id: str) -> None:
        self._send_ack(self._in_flight.remove(post_id))

    def _send_ack(self, deliveries: Sequence[Delivery]) -> None:
        if self._broker_thread is not None:
            self._broker_thread.ack(deliveries)

    def _requeue(self, post_id: str) -> None:
        deliveries = self._in_flight.remove(post_id)
        if self._broker_thread is not None:
            self._broker_thread.requeue(deliveries)

    # Leases, retries, counts -----------------------------------------------------------------

    def _look_after(self) -> None:
        now = time.monotonic()
        while self._published:
            if self._published[0][0]:
                self._persist(partial(self._store.published, *self._published[0]))
            self._published.popleft()
            self._publishing = False
        if now >= self._renew_due:
            self._renew_due = now + self._settings.lease_s / 3
            running = sorted(self._running)
            if running:
                self._persist(lambda: self._store.renew(running, self._now()))
        if now < self._second_due:
            return
        self._second_due = now + _SECOND_S
        if self._status.phase == "serving":
            self._release_orphans(now)
            self._publish_due()
            self._reconcile()
        open_jobs = self._persist(self._store.open_jobs)
        if open_jobs is not None:
            self._status.open_jobs = (open_jobs, now)

    def _release_orphans(self, now: float) -> None:
        if self._release_due is None:
            self._release_due = now + _RELEASE_AFTER_S
        elif now >= self._release_due:
            self._release_due = float("inf")
            released = self._persist(lambda: self._store.release_dead(self._now()))
            if released:
                log.info("king.orphans_released", jobs=released)

    def _publish_due(self) -> None:
        if self._publishing or self._broker_thread is None:
            return
        context = self._now()
        jobs = self._persist(lambda: self._store.claim_due(context, self._batch_size))
        if not jobs:
            return
        post_ids = [job.post_id for job in jobs]
        self._publish([job.message for job in jobs], post_ids, context)

    def _reconcile(self) -> None:
        if self._publishing or self._draining:
            return
        context = self._now()
        messages = self._reconciler.lost(context)
        if messages:
            self._publish(messages, [], context)  # there are no jobs to say it of

    def _publish(self, messages: list[PostMessage], jobs: list[str], context: ClaimContext) -> None:
        if self._broker_thread is not None:
            self._publishing = True
            self._broker_thread.publish(messages, lambda: self._published.append((jobs, context)))
