"""The downloader process: many connections, one pipe.

The main thread alone reads and writes the pipe; the threads take tasks from one queue and give
answers to another.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from common.errors import ConfigError, RetryableError
from config.settings import FetchSettings
from workers.fetch.client import Fetcher
from workers.fetch.spool import file_name
from workers.pool.pipe import Pipe
from workers.protocol import Began, Envelope, Failed, Failure, FetchTask, Ready, Reply, Stop
from workers.roles.batch import failure_of
from workers.roles.loop import Context, answer

_Todo: TypeAlias = "queue.SimpleQueue[Envelope | None]"
_FINISH_S = 2.0


class _Downloads:
    """The threads and the two queues around them."""

    def __init__(self, settings: FetchSettings, spool: Path) -> None:
        self._settings = settings
        self._spool = spool
        self._todo: _Todo = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self.answered, self._signal = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{i}", daemon=True)
            for i in range(settings.connections)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, envelope: Envelope) -> None:
        """Queue a download."""
        self._todo.put(envelope)

    def replies(self) -> list[Reply]:
        """What the threads have to say."""
        with suppress(BlockingIOError):
            while os.read(self.answered, 4096):
                pass
        replies: list[Reply] = []
        while True:
            try:
                replies.append(self._replies.get_nowait())
            except queue.Empty:
                return replies

    def finish(self, timeout_s: float) -> None:
        """Let the threads end what they have begun."""
        for _ in self._threads:
            self._todo.put(None)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _say(self, reply: Reply) -> None:
        self._replies.put(reply)
        with suppress(BlockingIOError):  # full: the main thread will wake anyway
            os.write(self._signal, b"r")

    def _work(self) -> None:
        fetcher = Fetcher(self._settings)
        while (envelope := self._todo.get()) is not None:
            self._download(fetcher, envelope)
        fetcher.close()

    def _download(self, fetcher: Fetcher, envelope: Envelope) -> None:
        task = envelope.task
        if envelope.deadline <= time.monotonic() or not isinstance(task, FetchTask):
            waited = Failure("fetch", RetryableError.__name__, "waited past its deadline", True)
            self._say(Failed(envelope.task_id, waited))
            return
        self._say(Began((envelope.task_id,)))
        started = time.perf_counter()
        try:
            target = self._spool / file_name(envelope.task_id)
            outcome = fetcher.fetch(task.media, target)
        except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
            self._say(Failed(envelope.task_id, failure_of("fetch", error)))
            return
        self._say(answer(envelope.task_id, outcome, time.perf_counter() - started))


def run(context: Context) -> None:
    """Serve downloads until told to stop or the King is gone.

    Raises:
        ConfigError: The spool is no folder.
    """
    spool = Path(context.launch.spool)
    if not context.launch.spool or not spool.is_dir():
        raise ConfigError(f"fetch.spool: {spool} is no folder")
    downloads = _Downloads(context.settings.fetch, spool)
    pipe = context.pipe
    pipe.send_wait(Ready())
    poller = select.poll()
    poller.register(downloads.answered, select.POLLIN)
    poller.register(pipe.fileno(), select.POLLIN)
    while True:
        poller.poll()
        for message in pipe.receive():
            if isinstance(message, Envelope):
                downloads.add(message)
            elif isinstance(message, Stop):
                _finish(downloads, pipe)
                return
        if pipe.closed:
            return
        for reply in downloads.replies():
            pipe.send_wait(reply)


def _finish(downloads: _Downloads, pipe: Pipe) -> None:
    downloads.finish(_FINISH_S)
    for reply in downloads.replies():
        pipe.send_wait(reply)
