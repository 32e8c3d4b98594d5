"""Processes that a server forks, which has loaded what they need once.

Each spawned process would load torch anew: 5 to 9 seconds, where the work of a test takes less
than one. The server never trains, so that what it forks can.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

LOADED = [
    "tests.support.fusion.runs",
    "tests.support.scripts.infer_rig",
    "corpus.analyze.command",
    "extractors.media.decode",
    "extractors.media.video",
]


def process_type() -> type[ForkServerProcess]:
    multiprocessing.set_forkserver_preload(LOADED)
    return ForkServerProcess


def start(target: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Call a function in a process of its own; it pickles."""
    process = process_type()(target=target, args=arguments)
    process.start()
    return process
