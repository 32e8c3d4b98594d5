"""A pool of processes that is safe around torch, OpenCV, databases and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any


def process_pool(
    processes: int, prepare: Callable[..., object], *arguments: Any
) -> ProcessPoolExecutor:
    """Return a pool of spawned processes; shut it down, for example with ``with``.

    A fork would carry the parent's locks, threads and database connections along. Ctrl-C is left to
    the parent, and the processes end when the parent does. ``prepare`` is called with the arguments
    in every process before its first task; what it raises breaks the pool.
    """
    return ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(prepare, arguments),
    )


def _begin(prepare: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    # A killed parent would leave its children waiting for tasks for ever.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
