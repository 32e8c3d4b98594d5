"""How many messages are in hand, and how many of their posts begin."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from common.post import Media, Post
from config.settings import BrokerSettings, KingSettings, Settings
from king.broker.base import Delivery, Prefetch
from king.broker_thread import BrokerThread
from king.jobs import ClaimContext, Outcome, Started
from king.messages import PostMessage
from king.status import Status
from king.store_thread import InFlight, Room, StoreInbox, StoreThread
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import posts
from tests.support.king.store_rig import tagged
from tests.support.services import wait_until


@pytest.mark.parametrize(
    ("prefetch", "media", "bounds"),
    [
        ("auto", 34, (34, 136, 512)),
        ("auto", 600, (600, 2400, 2400)),
        (1, 34, (1, 1, 1)),
        (2000, 34, (2000, 2000, 2000)),
    ],
)
def test_a_number_is_kept_and_auto_is_bounded_by_the_host(
    prefetch: Any, media: int, bounds: tuple[int, int, int]
) -> None:
    assert Prefetch.of(BrokerSettings(prefetch=prefetch), media) == Prefetch(*bounds)


def test_media_in_work_are_those_downloading_decoding_and_decoded() -> None:
    settings = Settings.model_validate(
        {"fetch": {"connections": 5}, "decode": {"processes": 3}, "workers": {"slots": 7}}
    )
    assert settings.media_in_work == 15


@pytest.mark.parametrize(
    ("width", "acknowledged", "following"),
    [
        (34, 0, 34),  # idle, or slow
        (34, 67, 34),
        (34, 68, 68),
        (34, 300, 272),
        (34, 900, 512),
        (68, 34, 68),  # it stays down to half
        (272, 200, 272),
        (272, 100, 68),
        (512, 300, 512),
        (512, 3, 34),
    ],
)
def test_as_many_as_passed_in_half_a_second(width: int, acknowledged: int, following: int) -> None:
    assert Prefetch(34, 34, 512).after(width, acknowledged) == following
    assert Prefetch(34, 34, 34).after(34, acknowledged) == 34


def test_posts_with_media_and_long_texts_wait_for_room() -> None:
    """Each is let in once, however often it asks, and its place is free when it leaves."""

    def post(post_id: str, text: str = "", media: int = 0) -> Post:
        return Post(post_id, text, tuple(Media("image", f"http://h/{i}") for i in range(media)))

    room = Room(2)
    assert room.admits(post("a", media=3))
    assert room.admits(post("a", media=3))
    assert room.free == 1
    assert room.admits(post("b", media=1))
    assert not room.admits(post("c", media=1))
    assert all(room.admits(post(f"text-{i}", "some text")) for i in range(100))
    room.leave("a")
    room.leave("unknown")
    assert room.admits(post("c", media=1))
    assert room.admits(post("long", "x" * (1 << 27)))
    assert not room.admits(post("one more", "y"))
    room.leave("long")
    assert room.admits(post("one more", "y"))


class _Notes(BrokerThread):
    """A broker thread that only notes what it is asked for."""

    def __init__(self, status: Status) -> None:
        super().__init__(MemoryBroker(), status, lambda _deliveries: ())
        self.did: list[tuple[str, str]] = []

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.did += [("ack", each.body.decode()) for each in deliveries]

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        self.did += [("requeue", each.body.decode()) for each in deliveries]

    def narrow(self, for_s: float) -> None:
        self.did.append(("narrow", ""))


class _Storing:
    """A store thread with room for two posts with media, and what it began."""

    def __init__(self, store: FakeStore, most_waiting: int = 2) -> None:
        in_flight, status = InFlight(), Status()
        self.inbox = StoreInbox(in_flight)
        self.broker_thread = _Notes(status)
        self.started: list[Started] = []
        self.thread = StoreThread(
            store,
            self.inbox,
            KingSettings(),
            owner="k1",
            is_dead=lambda _owner: False,
            status=status,
            in_flight=in_flight,
            broker_thread=self.broker_thread,
            start=self.started.append,
            batch_size=100,
            room=Room(2, most_waiting),
        )
        self._runs = threading.Thread(target=self.thread.run)

    def __enter__(self) -> "_Storing":
        self._runs.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.drain()
        self.thread.stop()
        self._runs.join()

    @property
    def began(self) -> list[str]:
        return [each.post_id for each in self.started]

    def deliver(self, *post_ids: str, redelivered: bool = False, priority: int = 0) -> None:
        messages = [PostMessage(post_id, priority=priority) for post_id in post_ids]
        self.inbox.deliver(
            [
                Delivery(m.encode() if priority else m.post_id.encode(), m.post_id, 1, redelivered)
                for m in messages
            ]
        )

    def end(self, number: int) -> None:
        self.inbox.finish(tagged(self.started[number]))

    def until(self, done: Callable[[], object]) -> None:
        wait_until(lambda: bool(done()), 30, "the store thread")


def _store() -> FakeStore:
    pictures = posts(*[f"m{i}" for i in range(9)], images=["http://h/1.jpg"])
    return FakeStore([*pictures, *posts("t1", "t2")])


def test_posts_with_media_begin_as_others_end_and_texts_pass_them() -> None:
    with _Storing(_store()) as it:
        it.deliver("m0", "m1", "m2", "m3", "t1")
        it.until(lambda: len(it.began) == 3)
        assert it.began == ["m0", "m1", "t1"]
        it.end(0)
        it.until(lambda: it.began[3:] == ["m2"])
        it.deliver("m5", priority=7)
        it.end(1)
        it.until(lambda: len(it.began) == 5)
        it.end(3)
        it.until(lambda: len(it.began) == 6)
        assert {*it.began[4:]} == {"m5", "m3"}
        assert ("narrow", "") not in it.broker_thread.did


def test_messages_for_which_there_is_long_no_room_go_back_once() -> None:
    """Other Kings may have them; those that were delivered before are kept."""
    with _Storing(_store()) as it:
        it.deliver("m0", "m1", "m2", "m3")  # two begin, two are next
        it.until(lambda: len(it.began) == 2)
        it.deliver("m4", redelivered=True)
        it.deliver("m5", "m6")
        it.until(lambda: len(it.broker_thread.did) >= 3)
        assert it.broker_thread.did[-2:] == [("requeue", "m6"), ("requeue", "m5")]
        assert {*it.broker_thread.did[:-2]} == {("narrow", "")}
        for number in range(3):
            it.end(number)
            it.until(lambda: len(it.began) == min(number + 3, 5))  # noqa: B023 - called here
        assert it.began == ["m0", "m1", "m2", "m3", "m4"]


def test_more_may_wait_in_hand_so_that_a_text_passes_them() -> None:
    with _Storing(_store(), most_waiting=7) as it:
        it.deliver(*[f"m{i}" for i in range(9)], "t1")
        it.until(lambda: len(it.began) == 3)
        assert it.began[-1] == "t1"
        assert not it.broker_thread.did


def test_what_waits_for_room_goes_back_at_the_end() -> None:
    with _Storing(_store()) as it:
        it.deliver("m0", "m1", "m2", "m3")
        it.until(lambda: len(it.began) == 2)
        assert not it.thread.idle
        it.thread.drain()
        it.until(lambda: it.thread.idle)
        assert {*it.broker_thread.did} == {("requeue", "m2"), ("requeue", "m3")}


class _BatchesStore(FakeStore):
    """A store that notes how many ends of posts it is given at once."""

    def __init__(self, known: Sequence[dict[str, Any]]) -> None:
        super().__init__(known)
        self.batches: list[int] = []

    def finish(self, outcomes: Sequence[Outcome], context: ClaimContext) -> list[Outcome]:
        self.batches.append(len(outcomes))
        return super().finish(outcomes, context)


@pytest.mark.parametrize(("in_work", "batches"), [(24, [8, 4]), (9, [1])])
def test_ends_of_posts_are_gathered_only_where_many_are_in_work(
    in_work: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of those beyond eight; a post that is nearly alone is written at once."""
    monkeypatch.setattr("king.store_thread._GATHER_S", 600.0)  # only the number ends the wait
    store = _BatchesStore(posts(*[f"t{i}" for i in range(in_work)]))
    with _Storing(store) as it:
        it.deliver(*[f"t{i}" for i in range(in_work)])
        it.until(lambda: len(it.began) == in_work)
        ended = 0
        for k, number in enumerate(batches):
            for _ in range(number):
                it.end(ended)
                ended += 1
            it.until(lambda: len(store.batches) > k)  # noqa: B023 - called here
        assert store.batches == batches


def test_what_is_gathered_does_not_wait_for_long() -> None:
    store = _BatchesStore(posts(*[f"t{i}" for i in range(24)]))
    with _Storing(store) as it:
        it.deliver(*[f"t{i}" for i in range(24)])
        it.until(lambda: len(it.began) == 24)
        it.end(0)  # and no other ends
        it.until(lambda: store.batches == [1])
