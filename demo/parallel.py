"""Jobs in processes of their own, with one progress bar for each or for all of them."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from common import processes
from common.errors import TaggingError
from common.progress import progress_bars, track

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_S = 0.2
_told: Any = None  # the queue that a job's process tells its progress on


def tell(name: str, done: int, total: int, note: str = "") -> None:
    """Report a job's progress from within it."""
    if _told is not None:
        _told.put((name, done, total, note))


def run_jobs(jobs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Any]:
    """Run functions side by side, one bar each; they report with `tell` under their name.

    Return what each gave, by its name.
    """
    channel = get_context("spawn").Queue()
    with process_pool(min(len(jobs), processes.cores()), channel) as pool, progress_bars() as bars:
        shown = {name: bars.add(name) for name in jobs}
        futures: dict[Future[Any], str] = {
            pool.submit(function, *arguments): name for name, (function, arguments) in jobs.items()
        }
        results: dict[str, Any] = {}
        open_ = set(futures)
        while open_:
            done, open_ = wait(open_, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            with suppress(queue.Empty):
                while True:
                    name, count, total, note = channel.get_nowait()
                    shown[name].update(count, note, total)
            for future in done:
                results[futures[future]] = future.result()
    return results


def map_items(
    title: str,
    function: Callable[[Item], Result],
    items: Sequence[Item],
    setup: Callable[..., None],
    arguments: tuple[Any, ...],
) -> list[Result]:
    """Map a function over items in one process per core; ``setup`` loads what it needs there."""
    with process_pool(min(len(items), processes.cores()), None, setup, arguments) as pool:
        return list(track(pool.map(function, items, chunksize=4), title, len(items)))


@contextmanager
def process_pool(
    count: int,
    channel: Any = None,
    setup: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end with the block, at once when it fails.

    TaggingError when one was killed.
    """
    threads = max(1, processes.cores() // max(1, count))
    pool = processes.process_pool(count, _begin, channel, threads, setup, arguments)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise TaggingError("a process of the demo was killed; is there enough memory?") from error
    except BaseException:
        # Ctrl-C, or a job that failed: what still runs is of no use to anybody.
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


def _begin(
    channel: Any, threads: int, setup: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    global _told  # noqa: PLW0603  one queue per process, set once as it begins
    _told = channel
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    import cv2

    from common.logs import configure_logs

    configure_logs("pretty", "warning")
    cv2.setNumThreads(1)
    if setup is not None:
        setup(*arguments)
