"""The dispatch thread on a fake pool: what an attempt comes to, and what it leaves behind."""

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.post import Failure, Media, Post
from config.features import FeatureSettings, OcrSettings
from config.settings import KingSettings, Settings
from king.dispatch_thread import DispatchThread
from king.jobs import Dead, Outcome, Released, Retry, Started, Tagged, Unreadable
from king.status import Status
from tests.support.fakes.pool import DIED, Answer, FakePool, decoded, default_answer
from tests.support.services import wait_until
from workers.protocol import DecodeTask, Extracted, ExtractTask, FetchTask, FuseTask, Task

FULL = Post(
    "p1",
    text="hello",
    media=(
        Media("image", "http://a/1"),
        Media("video", "http://a/2"),
        Media("audio", "http://a/3"),
    ),
)


DOWN = Failure("fetch", "FetchRetryable", "HTTP 503", retryable=True)


class Bench:
    """A dispatch thread on a fake pool, and what it said."""

    def __init__(
        self,
        spool: Path,
        answer: Callable[[Task], Answer] | None,
        king: KingSettings,
        **pool: object,
    ) -> None:
        self.pool = FakePool(spool, answer, **pool)  # type: ignore[arg-type]
        self.status = Status()
        self.outcomes: list[Outcome] = []
        self.spool = spool
        settings = Settings(king=king, features=FeatureSettings(ocr=OcrSettings()))
        self.thread = DispatchThread(
            self.pool, settings, self.status, self.outcomes.append, random.Random(1)
        )

    def run(self, *posts: Started, timeout_s: float = 60) -> list[Outcome]:
        """Work on posts until each has an outcome."""
        for post in posts:
            self.thread.start(post)
        wait_until(lambda: len(self.outcomes) >= len(posts), timeout_s, f"{len(posts)} outcomes")
        return self.outcomes

    def settle(self) -> None:
        """Nothing is left behind: no slot, no file, no post."""
        slots = self.pool.slots
        wait_until(lambda: slots.free == len(slots), 60, "free slots")
        wait_until(lambda: not list(self.spool.iterdir()), 60, "an empty spool")
        assert self.thread.in_flight == 0


@contextmanager
def bench(
    spool: Path,
    answer: Callable[[Task], Answer] | None = None,
    *,
    attempts: int = 3,
    deadline_s: float = 30,
    **pool: object,
) -> Iterator[Bench]:
    spool.mkdir(exist_ok=True)
    king = KingSettings(attempts=attempts, backoff_s=2, post_deadline_s=deadline_s)
    it = Bench(spool, answer, king, **pool)
    thread = threading.Thread(target=it.thread.run)
    thread.start()
    try:
        yield it
    finally:
        it.thread.stop()
        thread.join(60)
    assert it.pool.stopped


def begun(post: Post = FULL, attempt: int = 1) -> Started:
    """A post as the store thread hands it over."""
    return Started(post, post.post_id, attempt, received_at=time.monotonic())


def failing(kind: type, failure: Failure, name: str | None = None) -> Callable[[Task], Answer]:
    """Tasks of one kind (and extractor) fail, the others go well."""

    def answer(task: Task) -> Answer:
        if isinstance(task, kind) and (
            name is None or (isinstance(task, ExtractTask) and task.extractor == name)
        ):
            return failure
        return default_answer(task)

    return answer


def test_every_modality_reaches_the_fusion(tmp_path: Path) -> None:
    """Fetch, decode, extract, read, embed, fuse; and slots and files are free afterwards."""
    with bench(tmp_path / "s") as it:
        [outcome] = it.run(begun())
        assert isinstance(outcome, Tagged)
        assert set(outcome.result.modalities.values()) == {"ok"}
        assert [tag.name for tag in outcome.result.tags] == ["sport"]
        assert {"fetch", "decode", "extract", "fuse", "total"} == set(outcome.timings_ms)
        [fuse] = [task for task in it.pool.submitted if isinstance(task, FuseTask)]
        assert fuse.features.ocr_text == "words in the picture\nwords in the picture"
        it.settle()
    assert it.status.bundle == ("fake", "1")


def test_more_media_than_slots_do_not_deadlock(tmp_path: Path) -> None:
    media = tuple(Media("video", f"http://a/{i}") for i in range(6))
    with bench(tmp_path / "s", slots=1) as it:
        outcomes = it.run(*[begun(Post(f"p{i}", media=media)) for i in range(8)])
        assert all(isinstance(outcome, Tagged) for outcome in outcomes)
        it.settle()


@pytest.mark.parametrize(
    ("kind", "name", "broken"),
    [
        (FetchTask, None, {"video", "image", "audio", "ocr"}),
        (DecodeTask, None, {"video", "image", "audio", "ocr"}),
        (ExtractTask, "video", {"video"}),
        (ExtractTask, "text", {"text", "ocr"}),
    ],
)
def test_broken_modality_leaves_the_rest(
    tmp_path: Path, kind: type, name: str | None, broken: set[str]
) -> None:
    failure = Failure("decode", "MediaError", "not a picture")
    with bench(tmp_path / "s", failing(kind, failure, name)) as it:
        [outcome] = it.run(begun())
        assert isinstance(outcome, Tagged)
        assert {m for m, status in outcome.result.modalities.items() if status != "ok"} == broken
        it.settle()


@pytest.mark.parametrize(
    ("kind", "name", "failure"),
    [
        (FetchTask, None, DIED),
        (DecodeTask, None, DIED),
        (ExtractTask, "video", DIED),
        (ExtractTask, "ocr", DIED),
        (FetchTask, None, DOWN),
        (FetchTask, None, replace(DOWN, message="spool: No space left on device")),
        (DecodeTask, None, replace(DOWN, stage="decode", type="RetryableError")),
    ],
)
def test_what_may_pass_costs_the_attempt_but_not_the_last(
    tmp_path: Path, kind: type, name: str | None, failure: Failure
) -> None:
    """After the last the post is tagged from the rest, and its result says that it is partial."""
    with bench(tmp_path / "s", failing(kind, failure, name)) as it:
        [outcome] = it.run(begun())
        assert isinstance(outcome, Retry)
        assert outcome.failure == failure
        assert 0 <= outcome.delay_s <= 2
        it.settle()
    with bench(tmp_path / "s", failing(kind, failure, name)) as it:
        [outcome] = it.run(begun(attempt=3))
        assert isinstance(outcome, Tagged)
        assert "failed" in outcome.result.modalities.values() or name == "ocr"
        assert outcome.result.document()["partial"] is True
        it.settle()


def test_a_file_that_is_gone_for_good_costs_no_attempt(tmp_path: Path) -> None:
    """Also beside one that may come: the result is partial for that one, whichever failed first."""
    gone = Failure("fetch", "FetchRefused", "HTTP 404")
    media = tuple(Media("image", f"http://a/{i}") for i in range(3))

    def answer(down: str, task: Task) -> Answer:
        if isinstance(task, FetchTask) and not task.media.source.endswith("/0"):
            return DOWN if task.media.source.endswith(down) else gone
        return default_answer(task)

    for down, attempt, partial in (("-", 1, None), ("/1", 3, True), ("/2", 3, True)):
        with bench(tmp_path / "s", functools.partial(answer, down)) as it:
            [outcome] = it.run(begun(Post("p1", media=media), attempt))
            assert isinstance(outcome, Tagged)
            assert outcome.result.modalities["image"] == "ok"
            assert outcome.result.failures["image"] == (DOWN if partial else gone)
            assert outcome.result.document().get("partial") is partial


def test_nothing_usable_is_permanent_or_not_by_its_reasons(tmp_path: Path) -> None:
    """A 404 will stay one; a time-out may pass; an empty post never gets tags."""
    post = Post("p1", media=(Media("image", "http://a/1"),))
    refused = Failure("fetch", "FetchRefused", "HTTP 404")
    timeout = Failure("fetch", "FetchRetryable", "timed out", retryable=True)
    for failure, attempt, kind in ((refused, 1, Dead), (timeout, 1, Retry), (timeout, 3, Dead)):
        with bench(tmp_path / "s", failing(FetchTask, failure)) as it:
            [outcome] = it.run(begun(post, attempt))
            assert type(outcome) is kind
            assert isinstance(outcome, (Dead, Retry))
            assert outcome.failure.stage == "fetch"
            assert failure.message in outcome.failure.message
            it.settle()
    with bench(tmp_path / "s") as it:
        [outcome] = it.run(begun(Post("empty")))
        assert isinstance(outcome, Dead)
        assert (outcome.failure.stage, outcome.failure.type) == ("load", "NothingUsable")


@pytest.mark.parametrize(
    ("failure", "attempt", "kind"),
    [
        (DIED, 1, Retry),
        (DIED, 3, Dead),
        (Failure("fuse", "FeatureError", "wrong dimension"), 1, Dead),
    ],
)
def test_fusion_failures(tmp_path: Path, failure: Failure, attempt: int, kind: type) -> None:
    """Without the fusion there are no tags: its death is retried, its refusal is final."""
    with bench(tmp_path / "s", failing(FuseTask, failure)) as it:
        [outcome] = it.run(begun(attempt=attempt))
        assert type(outcome) is kind
        it.settle()


@pytest.mark.parametrize("kind", [FetchTask, DecodeTask, ExtractTask, FuseTask])
def test_post_deadline_ends_the_attempt(tmp_path: Path, kind: type) -> None:
    with bench(
        tmp_path / "s",
        lambda task: None if isinstance(task, kind) else default_answer(task),
        deadline_s=0.2,
    ) as it:
        [outcome] = it.run(begun())
        assert isinstance(outcome, Retry)
        assert outcome.failure.retryable
        it.settle()


def test_arrays_that_do_not_fit_together_are_a_failure(tmp_path: Path) -> None:
    dims = iter((4, 5))

    def answer(task: Task) -> Answer:
        if isinstance(task, ExtractTask) and task.extractor == "image":
            return Extracted(array=np.ones((1, next(dims)), np.float16))
        if isinstance(task, DecodeTask):
            return decoded("image")
        return default_answer(task)

    post = Post("p1", media=(Media("image", "http://a/1"), Media("image", "http://a/2")))
    with bench(tmp_path / "s", answer) as it:
        [outcome] = it.run(begun(post))
        assert isinstance(outcome, Dead)
        assert outcome.failure.type == "FeatureError"


def test_media_beyond_the_limit_are_left_out(tmp_path: Path) -> None:
    post = Post("p1", media=tuple(Media("image", f"http://a/{i}") for i in range(50)))
    with bench(tmp_path / "s") as it:
        [outcome] = it.run(begun(post))
        assert isinstance(outcome, Tagged)
        assert sum(isinstance(task, FetchTask) for task in it.pool.submitted) == 20
        it.settle()


def test_drain_gives_back_what_is_in_flight(tmp_path: Path) -> None:
    with bench(tmp_path / "s", lambda _task: None) as it:
        it.thread.start(begun())
        wait_until(lambda: bool(it.pool.submitted), 60, "a task")
        it.thread.give_back()
        outcomes = it.run(begun(replace(FULL, post_id="p2")), begun(replace(FULL, post_id="p3")))
        wait_until(lambda: len(outcomes) == 3, 60, "three outcomes")
        assert all(isinstance(outcome, Released) for outcome in outcomes)
        it.settle()


def test_refused_pool_and_new_bundle_reach_the_status(tmp_path: Path) -> None:
    with bench(tmp_path / "s", refuse="workshop/weights/current: no such bundle") as it:
        wait_until(lambda: it.status.refused is not None, 60, "the refusal")
        assert it.status.refused is not None
        assert "no such bundle" in it.status.refused.message
    with bench(tmp_path / "s") as it:
        it.run(begun())
        it.pool.swap_bundle("fake", "2")
        wait_until(lambda: it.status.bundle == ("fake", "2"), 60, "the new bundle")
        assert [worker["role"] for worker in it.status.workers] == ["extract"]


def test_random_failures_leave_no_slot_and_no_file(tmp_path: Path) -> None:
    rng = random.Random(5)

    def answer(task: Task) -> Answer:
        draw = rng.random()
        stage = {FetchTask: "fetch", DecodeTask: "decode", FuseTask: "fuse"}.get(type(task))
        if draw < 0.1:
            return replace(DIED, stage=stage or "extract")
        if draw < 0.2:
            return Failure(stage or "extract", "MediaError", "broken")
        return default_answer(task)

    with bench(tmp_path / "s", answer, slots=2) as it:
        posts = [begun(replace(FULL, post_id=f"p{i}"), attempt=i % 3 + 1) for i in range(60)]
        outcomes = it.run(*posts)
        ended = [o.started.post_id for o in outcomes if not isinstance(o, Unreadable)]
        assert sorted(ended) == sorted(post.post_id for post in posts)
        assert {type(outcome) for outcome in outcomes} == {Tagged, Retry, Dead}
        it.settle()
