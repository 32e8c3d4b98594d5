"""The downloader process: many connections, one channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import ConfigError, RetryableError
from common.post import Failure
from config.settings import FetchSettings
from workers.fetch.client import Fetcher
from workers.fetch.spool import file_name
from workers.protocol import Began, Command, Envelope, Failed, FetchTask
from workers.roles.loop import Context, ThreadedRole, answer
from workers.roles.tasks import failure_of


class _Downloads(ThreadedRole):
    def __init__(self, settings: FetchSettings, spool: Path) -> None:
        super().__init__(settings.connections, "fetch")
        self._settings = settings
        self._spool = spool

    @contextmanager
    def worker(self) -> Iterator[Callable[[Command], None]]:
        with closing(Fetcher(self._settings)) as fetcher:
            yield lambda message: self._download(fetcher, message)

    def _download(self, fetcher: Fetcher, message: Command) -> None:
        if not isinstance(message, Envelope) or not isinstance(message.task, FetchTask):
            return
        task_id = message.task_id
        if message.deadline <= time.monotonic():
            late = Failure("fetch", RetryableError.__name__, "waited past its deadline", True)
            self.reply(Failed(task_id, late))
            return
        self.reply(Began((task_id,)))
        started = time.perf_counter()
        try:
            fetched = fetcher.fetch(message.task.media, self._spool / file_name(task_id))
        except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
            self.reply(Failed(task_id, failure_of("fetch", error)))
            return
        self.reply(answer(task_id, fetched, time.perf_counter() - started))


def run(context: Context) -> None:
    """Serve downloads until told to stop or the King is gone.

    Raises:
        ConfigError: The spool is not a folder.
    """
    spool = Path(context.launch.spool)
    if not context.launch.spool or not spool.is_dir():
        raise ConfigError(f"fetch.spool: {spool} is not a folder")
    _Downloads(context.settings.fetch, spool).serve(context.channel)
