"""A King in a thread, on fake workers; for the tests of the King."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config.settings import BrokerSettings, FetchSettings, KingSettings, Settings, StoreSettings
from king.broker.base import Broker
from king.jobs import PostStore
from king.king import King
from tests.support.fakes.broker import MemoryQueue
from tests.support.fakes.pool import Answer, FakePool, default_answer
from workers.protocol import FuseTask, Task


def king_settings(
    folder: Path,
    *,
    store: StoreSettings | None = None,
    broker: BrokerSettings | None = None,
    **king: Any,
) -> Settings:
    """Settings with short times."""
    times: dict[str, Any] = {
        "backoff_s": 0.05,
        "backoff_max_s": 0.2,
        "lease_s": 3,
        "drain_timeout_s": 5,
        "health_file": folder / "king.json",
        "attempts": 3,
    }
    return Settings(
        king=KingSettings(**{**times, **king}),
        fetch=FetchSettings(spool=folder / "spool"),
        store=store or StoreSettings(),
        broker=broker or BrokerSettings(),
    )


def fake_pool(
    folder: Path, answer: Callable[[Task], Answer] | None = None, **pool: Any
) -> FakePool:
    spool = folder / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    return FakePool(spool, answer, **pool)


class Running:
    """A King that runs in a thread; stops it at the end of the ``with``."""

    def __init__(
        self,
        settings: Settings,
        pool: FakePool,
        *,
        store: PostStore | None = None,
        broker: Broker | None = None,
        owner: str = "k1",
        drain: bool = False,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.king = King(settings, pool=pool, store=store, broker=broker, owner=owner)
        self.exit_code: int | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(drain,))

    def _run(self, drain: bool) -> None:
        try:
            self.exit_code = self.king.run(drain=drain)
        except BaseException as error:  # noqa: BLE001 - shown to the test
            self.error = error

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self, timeout_s: float = 60) -> None:
        self.king.stop()
        self.join(timeout_s)

    def join(self, timeout_s: float = 60) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the King did not end"

    def until(self, done: Callable[[], Any], timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < end, "not in time"
            assert self._thread.is_alive() or done(), f"the King ended: {self.error!r}"
            time.sleep(0.01)


def on_fakes(
    folder: Path,
    store: PostStore,
    broker: Broker,
    answer: Callable[[Task], Answer] | None = None,
    **king: Any,
) -> Running:
    pool = fake_pool(folder, answer)
    return Running(king_settings(folder, **king), pool, store=store, broker=broker)


def posts(*ids: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"_id": post_id, "text": "hello", **fields} for post_id in ids]


def queue_of(*bodies: bytes) -> MemoryQueue:
    queue = MemoryQueue()
    for body in bodies:
        queue.put(body)
    return queue


class Gate:
    """Holds every fusion back until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, task: Task) -> Answer:
        if isinstance(task, FuseTask) and not self.open.is_set():
            return None
        return default_answer(task)
