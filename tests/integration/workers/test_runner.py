"""Posts through a pool without queue and database: the runner over fake and real workers."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    FeatureError,
    NothingUsable,
    RetryableError,
)
from common.post import Failure, Media, Modality, Post
from config.settings import Settings
from tests.support.fakes.pool import DIED, Answer, FakePool, default_answer
from tests.support.services import wait_until
from tests.support.workers.driving import alive, toy_settings
from tests.support.workers.toys import ROLES
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import worker_specs
from workers.protocol import DecodeTask, ExtractTask, FetchTask, FuseTask, Task
from workers.runner import PostRunner, extractors_of

ATTEMPTS = 3
SETTINGS = Settings.model_validate(
    {
        "features": {"ocr_mode": "separate"},
        "king": {"attempts": ATTEMPTS, "backoff_s": 0.01, "backoff_max_s": 0.02},
    }
)
URL = "https://host/a.png"


class Scripted:
    """Answers as `default_answer`, but for the given ones."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.held = threading.Event()

    def __call__(self, task: Task) -> Answer:
        if isinstance(task, ExtractTask):
            name: str = task.extractor
        else:
            name = type(task).__name__.removesuffix("Task").lower()
        told = self.answers.get(name)
        return told.pop(0) if told else default_answer(task)


Made = Callable[..., tuple[PostRunner, FakePool]]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes started runners over fake pools; afterwards nothing is held and no file is left."""
    spool = tmp_path / "fake-spool"
    spool.mkdir()
    runners: list[tuple[PostRunner, FakePool]] = []

    def make(answer: Callable[[Task], Answer] | None = None, **options: Any) -> Any:
        fake = {k: options.pop(k) for k in ("refuse", "latency_s") if k in options}
        pool = FakePool(spool, answer, **fake)
        runner = PostRunner(options.pop("settings", SETTINGS), pool=pool, **options)
        runners.append((runner, pool))
        runner.start()
        return runner, pool

    yield make
    for runner, pool in runners:
        runner.close()
        assert pool.stopped
        assert runner.in_flight == 0
        assert pool.slots.free == 4
    assert list(spool.iterdir()) == []


def test_a_post_goes_from_its_sources_to_its_tags(made: Made, tmp_path: Path) -> None:
    """A URL is downloaded, a file is read in place and stays; stages are timed."""
    runner, pool = made()
    local = tmp_path / "v.mp4"
    local.write_bytes(b"x")
    post = Post("p", "words", (Media("image", URL), Media("video", str(local))))
    ran = runner.submit(post).result(60)
    assert ran.fused is not None
    assert [tag.name for tag in ran.tags.tags] == ["sport"]
    assert ran.features.statuses["video"] == ran.features.statuses["image"] == "ok"
    assert set(ran.timings_ms) == {"fetch", "decode", "extract", "fuse", "total"}
    assert [t.media.source for t in pool.submitted if isinstance(t, FetchTask)] == [URL]
    assert str(local) in [t.path for t in pool.submitted if isinstance(t, DecodeTask)]
    assert local.exists()


def test_features_alone_need_no_fusion(made: Made) -> None:
    runner, pool = made(fuse=False)
    ran = runner.submit(Post("p", "words")).result(60)
    assert ran.fused is None
    assert ran.features.statuses["text"] == "ok"
    assert not any(isinstance(task, FuseTask) for task in pool.submitted)


def test_only_the_modalities_that_are_asked_for(made: Made) -> None:
    """The others cost nothing: no download, no extraction."""
    runner, pool = made(fuse=False, modalities=frozenset({"text"}))
    ran = runner.submit(Post("p", "words", (Media("video", URL),))).result(60)
    assert ran.features.statuses["text"] == "ok"
    assert ran.features.statuses["video"] == "missing"
    assert all(isinstance(t, ExtractTask) and t.extractor == "text" for t in pool.submitted)


def test_which_workers_a_modality_needs() -> None:
    """Their extractors and no others are hosted; words in pictures are embedded as text."""
    separate, append = (
        SETTINGS.features,
        SETTINGS.features.model_copy(update={"ocr_mode": "append"}),
    )
    assert extractors_of(None, separate) is None
    assert extractors_of({"text"}, separate) == frozenset({"text"})
    assert extractors_of({"text"}, append) == frozenset({"text", "ocr"})
    assert extractors_of({"ocr", "audio"}, separate) == frozenset({"text", "ocr", "audio"})
    specs = worker_specs(SETTINGS, fuse=False, extractors={"audio"})
    assert {spec.role for spec in specs} == {"fetch", "decode", "extract"}
    assert [spec.extractors for spec in specs if spec.role == "extract"] == [("audio",)]
    assert [s.role for s in worker_specs(SETTINGS)].count("fuse") == 1


def test_a_missing_file_costs_its_modality(made: Made, tmp_path: Path) -> None:
    """It is named; with nothing else there is nothing usable, and the reasons say so."""
    runner, _ = made()
    gone = Media("image", str(tmp_path / "gone.png"))
    ran = runner.submit(Post("p", "words", (gone,))).result(60)
    assert ran.features.statuses["image"] == "failed"
    assert "no such file" in ran.features.failures["image"].message
    with pytest.raises(NothingUsable) as caught:
        runner.submit(Post("p", "", (gone,))).result(60)
    assert set(caught.value.reasons) == {"image"}
    with pytest.raises(NothingUsable, match="no text and no media"):
        runner.submit(Post("p")).result(60)


@pytest.mark.parametrize("way", ["outside", "link", "above", "folder", "null"])
def test_files_outside_the_one_folder_are_not_read(made: Made, tmp_path: Path, way: str) -> None:
    """With a root only files that lie in it are read; links and dots do not lead out."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (root / "mine").write_text("x")
    (root / "link").symlink_to(secret)
    source = {
        "outside": str(secret),
        "link": str(root / "link"),
        "above": f"{root}/../secret",
        "folder": str(root / "sub"),
        "null": f"{root}/a\0b",
    }[way]
    runner, pool = made(local_root=root)
    with pytest.raises(NothingUsable):
        runner.submit(Post("p", "", (Media("image", source),))).result(60)
    assert pool.submitted == []
    runner.submit(Post("p", "", (Media("image", str(root / "mine")),))).result(60)


@pytest.mark.parametrize("stage", ["fetch", "decode", "image", "text"])
def test_a_workers_death_costs_an_attempt_but_not_the_last(made: Made, stage: str) -> None:
    """As in the daemon: the post begins again; in the last attempt a death costs the modality."""
    post = Post("p", "words", (Media("image", URL),))
    runner, _ = made(Scripted({stage: [DIED]}))
    ran = runner.submit(post).result(60)
    assert ran.features.statuses["image"] == ran.features.statuses["text"] == "ok"
    runner, _ = made(Scripted({stage: [DIED] * ATTEMPTS}))
    ran = runner.submit(post).result(60)
    assert ran.fused is not None
    broken: Modality = "text" if stage == "text" else "image"
    assert ran.features.statuses[broken] == "failed"
    assert ran.features.failures[broken].type == "WorkerDied"


def test_a_death_in_fusion_costs_an_attempt(made: Made) -> None:
    """There is no modality to lose: after the last attempt the post has failed, in that stage."""
    runner, pool = made(Scripted({"fuse": [DIED]}))
    assert runner.submit(Post("p", "words")).result(60).fused is not None
    assert [type(t).__name__ for t in pool.submitted] == ["ExtractTask", "FuseTask"] * 2
    runner, _ = made(Scripted({"fuse": [replace(DIED, stage="fuse")] * ATTEMPTS}))
    with pytest.raises(RetryableError, match="died") as died:
        runner.submit(Post("p", "words")).result(60)
    runner, _ = made(Scripted({"fuse": [Failure("fuse", "FeatureError", "of other features")]}))
    with pytest.raises(FeatureError, match="of other features") as refused:
        runner.submit(Post("p", "words")).result(60)
    assert died.value.stage == refused.value.stage == "fuse"


@pytest.mark.parametrize("attempts", [1, ATTEMPTS])
def test_what_may_pass_is_tried_as_often_as_the_policy_says(made: Made, attempts: int) -> None:
    """Downloads time out and nothing else is usable: the last attempt gives the reasons."""
    slow = Failure("fetch", "FetchRetryable", "timed out after 15 s", retryable=True)
    settings = SETTINGS.model_copy(
        update={"king": SETTINGS.king.model_copy(update={"attempts": attempts})}
    )
    runner, pool = made(lambda _task: slow, settings=settings)
    with pytest.raises(RetryableError, match="timed out") as caught:
        runner.submit(Post("p", media=(Media("image", URL),))).result(60)
    assert (caught.value.stage, set(caught.value.reasons)) == ("fetch", {"image"})
    assert len(pool.submitted) == attempts


@pytest.mark.parametrize("fails", [1, ATTEMPTS - 1, ATTEMPTS])
def test_a_host_that_is_down_costs_attempts_then_its_modality(made: Made, fails: int) -> None:
    """The others' features are there in the end; a host that comes back in time costs nothing."""
    down = Failure("fetch", "FetchRetryable", "HTTP 503", retryable=True)
    runner, pool = made(Scripted({"fetch": [down] * fails}))
    ran = runner.submit(Post("p", "words", (Media("image", URL),))).result(60)
    assert ran.features.statuses["image"] == ("failed" if fails == ATTEMPTS else "ok")
    assert ran.features.failures == ({"image": down} if fails == ATTEMPTS else {})
    assert ran.tags.tags
    assert sum(isinstance(task, FetchTask) for task in pool.submitted) == min(fails + 1, ATTEMPTS)


def test_a_post_without_time_for_another_attempt_is_tagged_from_the_rest(made: Made) -> None:
    """Rather than failed at its deadline."""
    king = SETTINGS.king.model_copy(update={"backoff_s": 60, "backoff_max_s": 60})
    down = Failure("fetch", "FetchRetryable", "HTTP 503", retryable=True)
    runner, _ = made(
        Scripted({"fetch": [down]}), settings=SETTINGS.model_copy(update={"king": king})
    )
    ran = runner.submit(Post("p", "words", (Media("image", URL),)), deadline_s=30).result(20)
    assert ran.features.failures == {"image": down}
    assert ran.features.statuses["text"] == "ok"


def test_a_pause_past_the_time_limit_is_not_waited_for(made: Made) -> None:
    """The caller gets the post's own failure in time, and not that it ran out of time."""
    king = SETTINGS.king.model_copy(update={"backoff_s": 1e6, "backoff_max_s": 1e6})
    runner, _ = made(
        Scripted({"fuse": [DIED]}), settings=SETTINGS.model_copy(update={"king": king})
    )
    with pytest.raises(RetryableError, match="died"):
        runner.submit(Post("p", "words"), deadline_s=30).result(20)


def never(task: Task) -> Answer:
    return None if isinstance(task, ExtractTask) else default_answer(task)


def test_a_deadline_ends_a_post(made: Made) -> None:
    runner, _ = made(never)
    began = time.monotonic()
    future = runner.submit(Post("p", "words", (Media("image", URL),)), deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"past 0\.2 s"):
        future.result(60)
    assert time.monotonic() - began < 8


def test_cancelling_breaks_a_post_off(made: Made) -> None:
    """Its place is free at once, not at its deadline."""
    runner, pool = made(never, limit=1)
    future = runner.submit(Post("p", "words", (Media("image", URL),)))
    wait_until(lambda: any(isinstance(t, ExtractTask) for t in pool.submitted), 60, "an extraction")
    assert future.cancel()
    wait_until(lambda: runner.in_flight == 0, 60, "room")


def test_intake_is_bounded(made: Made) -> None:
    """One more than the limit waits or is refused; the first that ends makes room."""
    runner, _ = made(never, limit=2)
    first, _second = (runner.submit(Post(name, "words")) for name in "ab")
    with pytest.raises(Busy, match="2 posts are in flight"):
        runner.submit(Post("c", "words"), wait_s=0)
    began = time.monotonic()
    with pytest.raises(Busy):
        runner.submit(Post("c", "words"), wait_s=0.2)
    assert 0.2 <= time.monotonic() - began < 10
    threading.Timer(0.2, first.cancel).start()
    assert not runner.submit(Post("c", "words")).done()


def test_closing_tells_who_waits(made: Made) -> None:
    runner, _ = made(never, limit=1)
    future = runner.submit(Post("a", "words"))
    errors: list[Exception] = []

    def submit() -> None:
        try:
            runner.submit(Post("b", "words"))
        except RetryableError as error:
            errors.append(error)

    waiting = threading.Thread(target=submit)
    waiting.start()
    time.sleep(0.1)
    runner.close()
    waiting.join(60)
    assert len(errors) == 1
    with pytest.raises(RetryableError, match="stopped"):
        future.result(0)
    with pytest.raises(RetryableError):
        runner.submit(Post("c", "words"))
    runner.close()


def test_a_refusal_is_raised(tmp_path: Path) -> None:
    """A pool that refuses is a mistake in the configuration; nothing can be submitted."""
    pool = FakePool(tmp_path, refuse="no such bundle")
    runner = PostRunner(SETTINGS, pool=pool)
    with pytest.raises(ConfigError, match="no such bundle"):
        runner.start()
    assert pool.stopped
    assert not runner.ready
    assert runner.trouble == "no such bundle"
    with pytest.raises(ConfigError, match="no such bundle"):
        runner.submit(Post("p", "words"))


def test_whoever_waits_for_models_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with PostRunner(SETTINGS, pool=FakePool(tmp_path, ready_after_s=2)):
        assert capsys.readouterr().err == "loading the models\n"


def test_a_runner_that_was_never_started(tmp_path: Path) -> None:
    """Constructing starts nothing, and closing needs no start."""
    runner = PostRunner(toy_settings(tmp_path / "spool"))
    with pytest.raises(RetryableError, match="not running"):
        runner.submit(Post("p", "words"))
    runner.close()
    assert not (tmp_path / "spool").exists()


def test_a_mistake_in_the_thread_is_told(made: Made) -> None:
    """A post is never left waiting for a thread that is dead."""

    def broken(task: Task) -> Answer:
        raise ZeroDivisionError

    runner, _ = made(broken)
    future = runner.submit(Post("p", "words"))
    with pytest.raises(RetryableError, match="ZeroDivisionError"):
        future.result(60)
    assert not runner.ready


def test_real_workers_that_are_killed(tmp_path: Path) -> None:
    """Toy workers: a post whose text kills its worker costs itself only; no process is left."""
    settings = toy_settings(
        tmp_path / "spool",
        features={"ocr_mode": "separate"},
        king={"attempts": 2, "backoff_s": 0.01},
    )
    with PostRunner(settings, pool=ProcessPool(settings, roles=ROLES)) as runner:
        pids = [view.pid for view in runner.workers if view.pid]
        assert len(pids) == 4
        killer = runner.submit(Post("kill", "kill:"))
        with pytest.raises((NothingUsable, RetryableError), match="died"):
            killer.result(60)
        assert next(view for view in runner.workers if view.role == "extract").deaths == 2
        slow = runner.submit(Post("p", "sleep:30"), deadline_s=0.5)
        with pytest.raises(DeadlineExceeded):
            slow.result(30)
        os.kill(next(v.pid for v in runner.workers if v.role == "fuse") or 0, signal.SIGKILL)
        pids += [view.pid for view in runner.workers if view.pid]
    assert alive(pids) == []
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [".lock"]


def test_a_missing_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    """The real fusion worker's refusal reaches who starts the runner; without fusion none is."""
    settings = toy_settings(tmp_path / "spool", fusion={"bundle": str(tmp_path / "none")})
    roles = {**ROLES, "fuse": "workers.roles.batched:fuse"}
    runner = PostRunner(settings, pool=ProcessPool(settings, roles=roles))
    with pytest.raises(ConfigError, match=str(tmp_path / "none")):
        runner.start()
    pool = ProcessPool(settings, roles=roles, fuse=False)
    with PostRunner(settings, fuse=False, pool=pool) as fine:
        assert fine.ready
        assert fine.bundle is None
        assert fine.fingerprints["text"]
