"""The store thread: it alone touches the database.

Deliveries come in, are claimed in batches and go on to the dispatch thread; outcomes come back,
are written in batches, and only then are their messages acknowledged. While the database is away,
the same batch is written again and again: nothing is acknowledged, so the broker delivers no more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Literal, TypeAlias, TypeVar

import structlog

from common.errors import MessageError, StoreRefused, StoreUnavailable
from common.post import Failure, Post
from common.retry import reconnect_delay_s
from config.settings import KingSettings
from king.broker.base import Delivery
from king.broker_thread import BrokerThread
from king.jobs import (
    Claim,
    ClaimContext,
    Dead,
    HeldElsewhere,
    NoRoom,
    Outcome,
    PostStore,
    Rejected,
    Released,
    Retry,
    Settled,
    Started,
    Superseded,
    Tagged,
    Unreadable,
    Verdict,
    WriteRefused,
    message_key,
)
from king.messages import PostMessage, parse_message
from king.status import IDLE_TICK_S, Status

T = TypeVar("T")

# How long a thread sleeps that has something to do again later; it is woken by whatever arrives. At
# half, a King whose database refuses a post wakes twice as often; at double, such posts come later.
_WAIT_S = 0.25
# Wait for the messages that follow on those just acknowledged. Without it a backlog of posts that
# need no work falls apart into batches of a few, which cost the database as much as whole ones; at
# double, a post that comes alone after others waits for nothing.
_MORE_S = 0.005
# A batch is gathered until half of the posts in work have ended, or for this long. A batch
# of one costs the database and the King nearly as much as one of ten. Where the share is one in
# four, batches are of four and a post costs the King a sixth more; at double the time, posts wait
# for nothing under a light load; at half, batches are of a few.
_GATHERED_SHARE = 2
_GATHER_S = 0.1
# Posts in work that nobody gathers on: a post that is nearly alone is not held back.
_NOT_GATHERED = 8
# How often due retries are published and jobs counted. At half, twice the queries to an idle
# database; at double, retries come two seconds late.
_LOOK_EVERY_S = 1.0
# Jobs of dead Kings are released this long after the start: by then the broker has delivered a dead
# King's messages again, and most posts go on without a second message.
_RELEASE_AFTER_S = 10.0
# A claim that another King holds is looked at again after this: that King may finish or die long
# before its lease ends. At half, it is asked for twice as often; at double, its post waits longer.
_MAX_PARKED_S = 2.0
# A job that the database refused is written again after this: its administrator may repair a rule.
_REFUSED_AGAIN_S = 10.0
# Characters of a message's body that are stored for people: long enough for any message that can
# be read, short enough that a flood of junk does not fill the database.
_PAYLOAD_CHARS = 4096

# Characters of the texts of posts in work, on top of which one more post may begin. Ordinary texts
# are far from it; at double, posts of 16 MB each could take that much more memory.
_MOST_TEXT_CHARS = 1 << 26
# Messages that have become slow are not hoarded for this long after some were given back. At half,
# a queue of cheap and slow posts gives back twice as often; at double, a queue that has become
# cheap passes slower for longer.
_NARROW_S = 10.0

RECONCILER_LEASE = "reconciler"

log = structlog.get_logger()


@dataclass(slots=True)
class _Post:
    delivery: Delivery
    since: float = field(default_factory=time.monotonic)


Added: TypeAlias = Literal["new", "again", "superfluous"]


class InFlight:
    """Posts in flight with the delivery that asked for each; safe between threads.

    It is acknowledged once the post's outcome is written. Further messages for the post need not
    wait for that: were its work lost, the first would be delivered again.
    """

    def __init__(self) -> None:
        self._posts: dict[str, _Post] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of posts in flight."""
        return len(self._posts)

    def add(self, post_id: str, delivery: Delivery) -> Added:
        """Add a delivery: ``new`` begins a post, ``again`` replaces one of a lost connection."""
        with self._lock:
            post = self._posts.get(post_id)
            if post is None:
                self._posts[post_id] = _Post(delivery)
                return "new"
            if post.delivery.generation == delivery.generation:
                return "superfluous"
            post.delivery = delivery
            return "again"

    def remove(self, post_id: str) -> Sequence[Delivery]:
        """Take a post out and return its delivery."""
        with self._lock:
            post = self._posts.pop(post_id, None)
        return [post.delivery] if post is not None else ()

    def touch(self, post_id: str) -> None:
        """Restart the clock of a post that waits on purpose and must not look like a stall."""
        with self._lock:
            if post_id in self._posts:
                self._posts[post_id].since = time.monotonic()

    @property
    def oldest_s(self) -> float:
        """Return the seconds for which the oldest post has been in flight."""
        with self._lock:
            since = [post.since for post in self._posts.values()]
        return time.monotonic() - min(since) if since else 0.0


class Room:
    """The posts in work, limited by number with media and by bytes of text; for one thread.

    Messages in hand may be far more than files can be in work, and a post that has begun runs
    towards its deadline, and is charged with an attempt when the King dies.
    """

    def __init__(self, most_with_media: int, most_waiting: int | None = None) -> None:
        self.most_with_media = most_with_media
        self.most_waiting = most_with_media if most_waiting is None else most_waiting
        self._with_media: set[str] = set()
        self._chars: dict[str, int] = {}
        self._sum_of_chars = 0

    @classmethod
    def around(cls, media_in_work: int, most_waiting: int) -> Room:
        """Return room for more than that by what is gathered: the workers have posts meanwhile."""
        return cls(media_in_work + media_in_work // _GATHERED_SHARE, most_waiting)

    @property
    def free(self) -> int:
        """Return how many posts with media may begin."""
        return self.most_with_media - len(self._with_media)

    def admits(self, post: Post) -> bool:
        """Take a post in, unless it has to wait; one that was taken in before is admitted again."""
        if post.post_id in self._chars:
            return True
        if (post.media and self.free < 1) or self._sum_of_chars > _MOST_TEXT_CHARS:
            return False
        if post.media:
            self._with_media.add(post.post_id)
        self._chars[post.post_id] = len(post.text)
        self._sum_of_chars += len(post.text)
        return True

    def leave(self, post_id: str) -> None:
        """Let a post out, if it was taken in."""
        self._with_media.discard(post_id)
        self._sum_of_chars -= self._chars.pop(post_id, 0)


@dataclass(frozen=True, slots=True)
class _UnreadableDelivery:
    """A message that could not be read, and its delivery."""

    outcome: Unreadable
    delivery: Delivery


_Ended: TypeAlias = Outcome | _UnreadableDelivery
_Item: TypeAlias = Claim | _Ended


class StoreInbox:
    """Deliveries and outcomes on their way to the store thread; bounded by ``broker.prefetch``."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._items: deque[_Item] = deque()
        self._arrived = threading.Condition()
        self._wake_at = 0  # items that are gathered before the store thread wakes up
        self._busy = False

    def deliver(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Take messages (broker thread); return those of posts that are in flight already."""
        items: list[_Item] = []
        superfluous = []
        for delivery in deliveries:
            payload = delivery.body.decode("utf-8", "backslashreplace")[:_PAYLOAD_CHARS]
            try:
                message = parse_message(delivery.body)
            except MessageError as error:
                outcome = Unreadable(payload, Failure.of("message", error))
                items.append(_UnreadableDelivery(outcome, delivery))
                continue
            added = self._in_flight.add(message.post_id, delivery)
            if added == "new":
                claim = Claim(message, payload, delivery.redelivered, delivery.traceparent)
                items.append(claim)
            elif added == "superfluous":
                superfluous.append(delivery)
        self._put(items)
        return superfluous

    def finish(self, outcome: Outcome) -> None:
        """Take the end of an attempt (dispatch thread)."""
        self._put([outcome])

    def _put(self, items: Sequence[_Item]) -> None:
        with self._arrived:
            self._items.extend(items)
            if len(self._items) >= self._wake_at:  # a wake-up for each item would cost as a batch
                self._arrived.notify()

    def wake(self) -> None:
        """End a wait for a batch (any thread)."""
        self._put(())

    @property
    def idle(self) -> bool:
        """Return True when nothing waits and the latest batch is done."""
        return not (self._items or self._busy)

    @property
    def empty(self) -> bool:
        """Return True when nothing waits."""
        return not self._items

    def next_batch(
        self, limit: int, wait_s: float, expected: int = 0, gather: int = 0
    ) -> list[_Item]:
        """Return what has arrived, after waiting for it; call `done` when it is worked off.

        For as many as are expected just now it waits a little longer, and for the number to gather
        longer than that.
        """
        with self._arrived:
            if not self._items:
                self._arrived.wait(wait_s)
            if self._items:
                self._wait_for(min(expected, limit), _MORE_S)
                self._wait_for(min(gather, limit), _GATHER_S)
            # Set under the lock, so that at no moment an item is neither waiting nor worked on.
            self._busy = bool(self._items)
            return [self._items.popleft() for _ in range(min(len(self._items), limit))]

    def _wait_for(self, count: int, wait_s: float) -> None:
        self._wake_at = count
        self._arrived.wait_for(lambda: len(self._items) >= count, wait_s)
        self._wake_at = 0

    def done(self) -> None:
        """Note that the latest batch is worked off."""
        self._busy = False


class StoreThread:
    """The thread that claims posts, writes outcomes, renews leases and publishes due retries."""

    def __init__(
        self,
        store: PostStore,
        inbox: StoreInbox,
        settings: KingSettings,
        *,
        owner: str,
        is_dead: Callable[[str], bool],
        status: Status,
        in_flight: InFlight,
        broker_thread: BrokerThread,
        start: Callable[[Started], None],
        batch_size: int,
        room: Room,
    ) -> None:
        """Describe the thread; `run` does the work."""
        self._store = store
        self._inbox = inbox
        self._settings = settings
        self._status = status
        self._in_flight = in_flight
        self._broker_thread = broker_thread
        self._start = start
        self._batch_size = batch_size
        self._room = room
        self._waiting: list[Claim] = []  # for room, those of the highest priority first
        self._context = ClaimContext(
            owner=owner,
            bundle=("", ""),
            now=0.0,
            retry=settings.retry,
            lease_s=settings.lease_s,
            is_dead=is_dead,
            admits=room.admits,
        )
        self._parked: list[tuple[float, Claim]] = []
        self._unwritten: list[tuple[float, _Ended]] = []
        self._running: set[str] = set()
        self._settled: list[Delivery] = []  # to be acknowledged at the end of a batch
        self._expected = 0  # messages that follow on the acknowledged ones, if any wait
        self._publishing = False
        self._published: deque[tuple[list[str], ClaimContext]] = deque()
        self._draining = False
        self._leaving = threading.Event()
        self._stopping = threading.Event()
        self._look_due = self._renew_due = 0.0
        self._release_due: float | None = None
        self._reconcile_every_s = settings.reconcile_s or float("inf")
        # Not at once: posts that a platform inserts and publishes in one go are not lost.
        self._reconcile_due = time.monotonic() + self._reconcile_every_s

    def drain(self) -> None:
        """Begin no more posts: what has not begun goes back to the broker (any thread)."""
        self._draining = True
        self._inbox.wake()

    @property
    def idle(self) -> bool:
        """Return True when nothing waits to be begun or written."""
        publishing = self._publishing and self._status.publish_refused is None
        waits = self._waiting or self._parked or self._unwritten or publishing
        return self._inbox.idle and not waits

    def leave(self) -> None:
        """Give up waiting for a database that is away, since a drain has run out of time."""
        self._leaving.set()

    def stop(self) -> None:
        """Let `run` return once the inbox is empty."""
        self._stopping.set()
        self._inbox.wake()

    def run(self) -> None:
        """Serve until `stop`."""
        self._persist(self._store.connect)
        try:
            while not (self._stopping.is_set() and self._inbox.empty):
                batch = self._inbox.next_batch(
                    self._batch_size, self._wait_s, self._expected, self._gather
                )
                self._expected = 0
                self._work_off(batch)
        finally:
            self._store.close()

    @property
    def _wait_s(self) -> float:
        if self._stopping.is_set():
            return 0.0
        if self._parked or self._unwritten or self._draining:
            return _WAIT_S
        return min(IDLE_TICK_S, max(0.0, self._look_due - time.monotonic()))

    @property
    def _gather(self) -> int:
        leaving = self._draining or self._stopping.is_set()
        return 0 if leaving else max(0, len(self._running) - _NOT_GATHERED) // _GATHERED_SHARE

    def _work_off(self, batch: Sequence[_Item]) -> None:
        self._status.tick("store")
        # Outcomes first: they end what the claims might wait for.
        ended = [item for item in batch if not isinstance(item, Claim)]
        self._write([*self._due_again(), *ended])
        self._ack_settled()
        self._begin([item for item in batch if isinstance(item, Claim)])
        self._ack_settled()
        self._inbox.done()
        if not self._stopping.is_set() and not self._leaving.is_set():
            self._look_after()

    def _now(self) -> ClaimContext:
        bundle = self._status.bundle or ("", "")
        return replace(self._context, now=round(self._store.now, 3), bundle=bundle)

    def _persist(self, work: Callable[[], T]) -> T | None:
        """Repeat work on the store until it succeeds; None when it is refused, or at the end."""
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

    def _begin(self, claims: list[Claim]) -> None:
        now = time.monotonic()
        claims += [claim for until, claim in self._parked if until <= now or self._draining]
        self._parked = [] if self._draining else [p for p in self._parked if p[0] > now]
        count = len(self._waiting) if self._draining else self._room.free
        claims = self._waiting[:count] + claims
        del self._waiting[:count]
        if not claims:
            return
        if self._draining:
            for claim in claims:
                self._requeue(claim.message.post_id)
            return
        context = self._now()
        verdicts = self._persist(lambda: self._store.begin(claims, context))
        if verdicts is None:
            for claim in claims:
                self._room.leave(claim.message.post_id)
            return
        for claim, verdict in zip(claims, verdicts, strict=True):
            self._act(claim, verdict, context)
        self._waiting.sort(key=lambda claim: -claim.message.priority)
        self._give_back_hoard()

    def _act(self, claim: Claim, verdict: Verdict, context: ClaimContext) -> None:
        post_id = claim.message.post_id
        if not isinstance(verdict, Started):
            self._room.leave(post_id)  # another King was quicker
        match verdict:
            case NoRoom():
                self._waiting.append(claim)
            case Started():
                self._in_flight.touch(post_id)
                self._running.add(post_id)
                self._start(verdict)
            case HeldElsewhere():
                wait_s = min(verdict.until - context.now, _MAX_PARKED_S)
                self._parked.append((time.monotonic() + wait_s, claim))
            case WriteRefused():
                _log_write_refused(verdict)
                self._in_flight.touch(post_id)
                self._parked.append((time.monotonic() + _REFUSED_AGAIN_S, claim))
            case Rejected():
                self._status.ended(verdict)
                log.error(
                    "king.post_failed",
                    post_id=post_id,
                    attempt=verdict.attempts,
                    error=_reason(verdict.failure),
                )
                self._ack(post_id)
            case Settled():
                self._status.ended(verdict)
                log.info("king.message_settled", post_id=post_id, reason=verdict.reason)
                self._ack(post_id)

    def _give_back_hoard(self) -> None:
        """Return messages that other Kings could work on: those behind the next ones here.

        Each only once, since a broker may count how often it delivers a message.
        """
        hoard = self._waiting[self._room.most_waiting :]
        returned = [claim for claim in hoard if not claim.redelivered]
        if returned:
            self._broker_thread.narrow(_NARROW_S)
            for claim in reversed(returned):  # put back one by one before the others
                self._waiting.remove(claim)
                self._requeue(claim.message.post_id)

    def _write(self, items: Sequence[_Ended]) -> None:
        if not items:
            return
        outcomes = [i.outcome if isinstance(i, _UnreadableDelivery) else i for i in items]
        context = self._now()
        recorded = self._persist(lambda: self._store.finish(outcomes, context))
        for item, outcome in zip(items, recorded or (), strict=recorded is not None):
            if isinstance(outcome, WriteRefused):
                self._write_later(item, outcome)
            elif isinstance(item, _UnreadableDelivery):
                self._status.ended(item.outcome)
                log.error(
                    "king.message_refused",
                    dead_letter=message_key(item.outcome.payload),
                    error=_reason(item.outcome.failure),
                )
                self._settled.append(item.delivery)
            elif not isinstance(outcome, Unreadable):
                self._close(outcome)

    def _write_later(self, item: _Ended, refused: WriteRefused) -> None:
        """Write an outcome later whose job was refused; its message stays unacknowledged."""
        _log_write_refused(refused)
        if not self._draining:
            self._in_flight.touch(refused.post_id)
            self._unwritten.append((time.monotonic() + _REFUSED_AGAIN_S, item))
        elif isinstance(item, _UnreadableDelivery):
            self._broker_thread.requeue([item.delivery])
        else:
            self._ended(refused.post_id)
            self._requeue(refused.post_id)

    def _due_again(self) -> list[_Ended]:
        """Return the refused outcomes to write once more; during a drain, all of them."""
        waiting, now = self._unwritten, time.monotonic()
        due = [item for until, item in waiting if until <= now or self._draining]
        self._unwritten = [] if self._draining else [pair for pair in waiting if pair[0] > now]
        return due

    def _close(self, outcome: Tagged | Superseded | Retry | Dead | Released) -> None:
        """Count, log and acknowledge an attempt whose outcome is written."""
        started = outcome.started
        self._ended(started.post_id)
        if isinstance(outcome, Released):
            self._requeue(started.post_id)
            return
        total_s = time.monotonic() - started.received_at
        self._status.ended(outcome, total_s)
        line = log.bind(
            post_id=started.post_id,
            attempt=started.attempt,
            timings_ms=dict(outcome.timings_ms),
            total_ms=round(total_s * 1000),
        )
        match outcome:
            case Tagged():
                result = outcome.result
                failures = {str(m): _reason(f) for m, f in result.failures.items()}
                line.info(
                    "king.post_tagged",
                    tags=[tag.name for tag in result.tags],
                    modalities=dict(result.modalities),
                    **({"partial": True} if result.partial else {}),
                    **({"failures": failures} if failures else {}),
                )
            case Superseded(version=version):
                why = (
                    f"bundle {version} has tagged it; to go back: insighttag bundle rollback"
                    if version
                    else "the post is gone"
                )
                line.warning("king.result_superseded", why=why)
            case Retry():
                due_in_s = round(outcome.delay_s, 2)
                line.warning("king.post_retry", due_in_s=due_in_s, error=_reason(outcome.failure))
            case Dead():
                line.error("king.post_failed", error=_reason(outcome.failure))
        self._ack(started.post_id)

    def _ended(self, post_id: str) -> None:
        self._running.discard(post_id)
        self._room.leave(post_id)

    def _ack(self, post_id: str) -> None:
        self._settled += self._in_flight.remove(post_id)

    def _ack_settled(self) -> None:
        settled, self._settled = self._settled, []
        self._expected += len(settled)
        self._broker_thread.ack(settled)

    def _requeue(self, post_id: str) -> None:
        self._broker_thread.requeue(self._in_flight.remove(post_id))

    def _look_after(self) -> None:
        """Renew leases, publish what is due, and count the jobs."""
        now = time.monotonic()
        for claim in self._waiting:
            self._in_flight.touch(claim.message.post_id)
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
        if now < self._look_due:
            return
        self._look_due = now + _LOOK_EVERY_S
        if self._status.phase == "serving":
            self._release_orphans(now)
            self._publish_due()
            self._reconcile(now)
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
        if self._publishing:
            return
        context = self._now()
        jobs = self._persist(lambda: self._store.claim_due(context, self._batch_size))
        if jobs:
            post_ids = [job.post_id for job in jobs]
            self._publish([job.message for job in jobs], post_ids, context)

    def _reconcile(self, now: float) -> None:
        """Publish a batch of posts with neither result nor job: lost messages, or none ever sent.

        With room in the batch, also posts whose result has been partial for a while. A post that is
        published needlessly is settled or joins its running job.
        """
        if self._publishing or self._draining or now < self._reconcile_due:
            return
        self._reconcile_due = now + self._reconcile_every_s
        context = self._now()
        messages = lost_messages(self._store, context, self._reconcile_every_s, self._batch_size)
        if messages:
            self._publish(messages, [], context)  # there are no jobs to note it in

    def _publish(self, messages: list[PostMessage], jobs: list[str], context: ClaimContext) -> None:
        self._publishing = True

        def confirmed() -> None:
            self._published.append((jobs, context))
            self._inbox.wake()

        self._broker_thread.publish(messages, confirmed)


def lost_messages(
    store: PostStore, context: ClaimContext, period_s: float, limit: int
) -> list[PostMessage]:
    """Return messages for posts that nobody will tag; none where another King looks for them.

    A database that does not answer, or gives no right to take leases, costs this period only.
    """
    try:
        # Twice the period, so that the holder renews its lease in time.
        if not store.take_lease(RECONCILER_LEASE, context, 2 * period_s):
            return []
        ids = chain(store.untagged_ids(), store.partial_ids(context))
        messages = [PostMessage(post_id) for post_id in islice(ids, limit)]
    except (StoreRefused, StoreUnavailable) as error:
        log.warning("king.reconcile_failed", error=str(error))
        return []
    if messages:
        log.info("king.reconciled", posts=len(messages))
    return messages


def _log_write_refused(refused: WriteRefused) -> None:
    log.error(
        "king.job_refused",
        post_id=refused.post_id,
        reason=refused.reason,
        retry_in_s=_REFUSED_AGAIN_S,
    )


def _reason(failure: Failure) -> str:
    return f"{failure.stage}: {failure.type}: {failure.message}"
