"""Drive a real pool in tests: submit, wait for the events of chosen tasks, look at processes."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from common.post import Features, Media, Post
from config.settings import Settings
from tests.support.workers.toys import ROLES
from workers import protocol
from workers.pool.pool import ProcessPool
from workers.post_run import PostOutcome, PostPlan, PostRun, PostRuns, PostTags

PATIENCE_S = 180.0
"""Loading torch takes a worker a minute where many tests share two cores."""


def toy_settings(spool: Path, **sections: Any) -> Settings:
    """Small settings: one decoder, one extract worker that hosts everything, four slots."""
    values: dict[str, Any] = {
        "fetch": {"spool": str(spool), "connections": 4},
        "decode": {"processes": 1, "max_audio_s": 5},
        "workers": {"slots": 4},
        "log": {"format": "json", "level": "warning"},
    }
    for name, content in sections.items():
        values[name] = {**values.get(name, {}), **content}
    return Settings.model_validate(values)


class Driver:
    """A pool and what it has told so far."""

    def __init__(
        self,
        settings: Settings,
        roles: Mapping[protocol.WorkerRole, str] = ROLES,
        grace_s: float = 0.5,
    ) -> None:
        self.settings = settings
        self.pool = ProcessPool(settings, roles=roles, grace_s=grace_s)
        self.told: list[protocol.PoolEvent] = []

    def until(self, true: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < end, f"timed out; told: {self.told[-5:]}"
            self.told += self.pool.poll(0.2)

    def ready(self) -> None:
        """Every worker is up."""
        self.until(lambda: self.pool.ready and all(w.state == "ready" for w in self.pool.workers))

    def start(self) -> "Driver":
        self.pool.start()
        self.until(
            lambda: any(
                isinstance(e, (protocol.PoolReady, protocol.PoolRefused)) for e in self.told
            )
        )
        if protocol.PoolReady() not in self.told:
            self.pool.stop(1)
            raise AssertionError(f"the pool refused to start: {self.told}")
        return self

    def submit(self, task: protocol.Task, *, seconds: float = PATIENCE_S, priority: int = 0) -> int:
        return self.pool.submit(task, deadline=time.monotonic() + seconds, priority=priority)

    @contextlib.contextmanager
    def held(self, make: Callable[[str], protocol.Task], folder: Path) -> Iterator[int]:
        """A task that a worker has begun, and that ends after the block or with its worker."""
        folder.mkdir()
        task_id = self.submit(make(f"hold:{folder}"))
        self.until((folder / "held").exists)
        try:
            yield task_id
        finally:
            (folder / "go").touch()

    def outcome(self, task_id: int) -> protocol.Done | protocol.Failed | None:
        for event in self.told:
            if isinstance(event, (protocol.Done, protocol.Failed)) and event.task_id == task_id:
                return event
        return None

    def wait(self, task_id: int) -> protocol.Done | protocol.Failed:
        self.until(lambda: self.outcome(task_id))
        outcome = self.outcome(task_id)
        assert outcome is not None
        return outcome

    def done(self, task_id: int) -> protocol.Done:
        event = self.wait(task_id)
        assert isinstance(event, protocol.Done), event
        return event

    def failed(self, task_id: int) -> protocol.Failed:
        event = self.wait(task_id)
        assert isinstance(event, protocol.Failed), event
        return event

    def run(self, task: protocol.Task, **options: Any) -> Any:
        return self.done(self.submit(task, **options)).result

    def say(self, text: str, **options: Any) -> str:
        """Return the extract worker's answer to a text."""
        result = self.run(text_task(text), **options)
        assert isinstance(result, protocol.Extracted)
        assert result.text is not None
        return result.text

    def decode(self, text: str = "x") -> protocol.Decoded:
        result = self.run(decode_task(text))
        assert isinstance(result, protocol.Decoded)
        return result

    def view(self, name: str) -> protocol.WorkerView:
        return next(w for w in self.pool.workers if w.name == name)

    def pid(self, name: str) -> int:
        pid = self.view(name).pid
        assert pid is not None
        return pid

    @property
    def free_slots(self) -> int:
        return self.pool._scheduler.slots.free

    def holds_nothing(self) -> None:
        """Once it is idle, each slot is free and no file is in the spool."""
        self.until(lambda: not self.pool._scheduler.busy)
        assert self.free_slots == 4
        spool = self.pool._spool
        assert spool is not None
        assert [path.name for path in spool.folder.iterdir()] == ["lock"]

    def stop(self) -> None:
        pids = [w.pid for w in self.pool.workers if w.pid is not None]
        self.pool.stop(10)
        assert not alive(pids), "a worker outlived its pool"


def through(driver: Driver, *posts: Post, cache: bool = False) -> list[Features]:
    outcomes: dict[PostRun, PostOutcome] = {}
    runs = PostRuns(driver.pool, fuse=False)
    begun = [
        PostRun(
            PostPlan(post, driver.settings.features, max_media=20, cache=cache),
            deadline=time.monotonic() + PATIENCE_S,
            limit="the test's patience",
            last=True,
            on_end=outcomes.__setitem__,
        )
        for post in posts
    ]
    for run in begun:
        runs.begin(run)
    while len(runs):
        for event in driver.pool.poll(0.1):
            if isinstance(event, (protocol.Done, protocol.Failed)):
                runs.handle(event)
        runs.expire()
    results = [outcomes[run] for run in begun]
    assert all(isinstance(outcome, PostTags) for outcome in results), results
    return [outcome.features for outcome in results if isinstance(outcome, PostTags)]


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run; a zombie that its parent has not read yet does not."""
    running = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
        except psutil.NoSuchProcess:
            continue
    return running


def memory_files() -> int:
    """Descriptors of slots that this process holds."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            count += "insighttag-slots" in str(descriptor.readlink())
        except FileNotFoundError:
            continue  # the one that listed the folder
    return count


def text_task(text: str) -> protocol.ExtractTask:
    return protocol.ExtractTask("text", "text", text=text)


def decode_task(text: str = "x") -> protocol.DecodeTask:
    return protocol.DecodeTask("video", text, -1)


def fetch_task(text: str) -> protocol.FetchTask:
    return protocol.FetchTask(Media("image", text))


def fuse_task(text: str) -> protocol.FuseTask:
    return protocol.FuseTask(Features(text, {}, {}))
