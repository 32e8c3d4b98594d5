"""The main of every worker process, and the loop that all but the downloader run.

    python -m workers DESCRIPTOR KING_PID

The loop is greedy: it drains its pipe, takes the oldest task and every waiting task of the same
kind up to a batch, runs them, and never waits for more to come.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from common.errors import RetryableError, TaggingError, one_line
from common.logs import configure_logs
from config.settings import Settings
from workers.pool.arena import Arena
from workers.pool.batching import Lane, batch_rows, lane_of, stage_of, weight_of
from workers.pool.launch import BROKEN_STATUS, REFUSED_STATUS, Launch
from workers.pool.pipe import Pipe, PipeBroken
from workers.protocol import Began, Done, Envelope, Failed, Failure, Ready, Refused, Stop, Task
from workers.roles.batch import DeviceLost, Outcome
from workers.roles.recycle import Recycler

_log = structlog.get_logger()
_PR_SET_PDEATHSIG = 1
_LAUNCH_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Context:
    """What a role's function gets.

    Attributes:
        arena: The shared slots; None for a role that does not use them.
    """

    pipe: Pipe
    launch: Launch
    settings: Settings
    arena: Arena | None


class Retire(Exception):
    """Raised by a handler between two batches: a fresh process shall take over."""


class Handler(Protocol):
    """What a role does; `serve` does the rest."""

    def load(self) -> Mapping[str, str]:
        """Load models; what it returns goes into `Ready`.

        Raises:
            TaggingError: It cannot start, and a restart would not help.
        """
        ...

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """One result or failure per task, in order."""
        ...

    def between(self, pipe: Pipe) -> float | None:
        """Called between batches and when idle; seconds until it wants to be called again.

        Raises:
            Retire: End this process, and have it replaced.
        """
        ...

    def told(self, message: object) -> None:
        """A message that is no task."""
        ...

    def close(self) -> None:
        """Free what `load` took."""
        ...


def serve(context: Context, handler: Handler) -> None:
    """Load, say so, and run batches until told to stop or the King is gone."""
    pipe = context.pipe
    pipe.send_wait(Ready(dict(handler.load())))
    backlog: deque[Envelope] = deque()
    rows = batch_rows(context.settings)
    recycler = Recycler(context.settings.workers)
    try:
        while True:
            idle_s = handler.between(pipe)
            for message in pipe.receive_wait(0.0 if backlog else idle_s):
                if isinstance(message, Envelope):
                    backlog.append(message)
                elif isinstance(message, Stop):
                    return
                else:
                    handler.told(message)
            if pipe.closed:
                return
            if backlog:
                batch = take_batch(backlog, rows)
                _run_batch(pipe, handler, batch)
                reason = recycler.served(len(batch))
                if reason is not None:
                    raise Retire(reason)  # what is left in the backlog has not begun
    except Retire as retire:
        _log.info("workers.retired", reason=str(retire) or None)
    finally:
        handler.close()


def take_batch(backlog: deque[Envelope], rows: Mapping[Lane, int]) -> list[Envelope]:
    """Take the oldest task and those that fit into its batch; the others keep their order."""
    first = backlog.popleft()
    batch = [first]
    if first.solo:
        return batch
    lane, room = lane_of(first.task), 1.0 - weight_of(first.task, rows)
    left: list[Envelope] = []
    while backlog:
        envelope = backlog.popleft()
        weight = weight_of(envelope.task, rows)
        if not envelope.solo and lane_of(envelope.task) == lane and weight <= room + 0.001:
            room -= weight
            batch.append(envelope)
        else:
            left.append(envelope)
    backlog.extend(left)
    return batch


def _run_batch(pipe: Pipe, handler: Handler, batch: list[Envelope]) -> None:
    now = time.monotonic()
    for envelope in batch:
        if envelope.deadline <= now:
            stage = stage_of(lane_of(envelope.task))
            waited = Failure(stage, RetryableError.__name__, "waited past its deadline", True)
            pipe.send_wait(Failed(envelope.task_id, waited))
    live = [envelope for envelope in batch if envelope.deadline > now]
    if not live:
        return
    pipe.send_wait(Began(tuple(envelope.task_id for envelope in live)))
    started = time.perf_counter()
    outcomes = handler.run([envelope.task for envelope in live])
    share_s = (time.perf_counter() - started) / len(live)
    for envelope, outcome in zip(live, outcomes, strict=True):
        pipe.send_wait(answer(envelope.task_id, outcome, share_s))


def answer(task_id: int, outcome: Outcome, seconds: float) -> Done | Failed:
    """The reply that tells an outcome; ``seconds`` is the task's share of its batch's time."""
    if isinstance(outcome, Failure):
        return Failed(task_id, outcome)
    return Done(task_id, outcome, seconds)


# Birth ---------------------------------------------------------------------------------------


def die_with_parent(king_pid: int) -> None:
    """Have the kernel kill this process when the King ends, however it ends.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != king_pid:
        sys.exit(1)  # it ended before the line above


def ignore_signals() -> None:
    """Leave it to the King when to stop: SIGTERM and SIGINT reach the whole group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def set_title(title: str) -> None:
    """Name the process for ``ps``; titles never hold a URL or a post's data."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(f"insighttag: {title}")


class _LibraryLog(logging.Handler):
    """Standard error holds JSON lines: what libraries log becomes events of level debug."""

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:300]
        _log.debug("workers.library", logger=record.name, text=text)


def _quiet_libraries() -> None:
    logging.captureWarnings(True)
    logging.getLogger().addHandler(_LibraryLog(logging.WARNING))
    logging.getLogger("urllib3").propagate = False  # its lines hold URLs of posts


def _first_message(pipe: Pipe) -> Launch:
    end = time.monotonic() + _LAUNCH_TIMEOUT_S
    while time.monotonic() < end and not pipe.closed:
        # The King sends nothing more before `Ready`: there can be only one message.
        for message in pipe.receive_wait(end - time.monotonic()):
            if isinstance(message, Launch):
                return message
    raise PipeBroken("the King sent no launch message")


def _role(name: str) -> Callable[[Context], None]:
    module, _, function = name.partition(":")
    found: Callable[[Context], None] = getattr(importlib.import_module(module), function)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run one worker; its exit status."""
    ignore_signals()
    descriptor, king_pid = int(arguments[0]), int(arguments[1])
    die_with_parent(king_pid)
    pipe = Pipe(socket.socket(fileno=descriptor))
    os.set_inheritable(descriptor, False)
    launch = _first_message(pipe)
    devices = f" {launch.device} {','.join(launch.extractors)}" if launch.extractors else ""
    set_title(f"{launch.role}{devices}")
    settings = Settings.model_validate_json(launch.settings)
    configure_logs(settings.log.format, settings.log.level)
    structlog.contextvars.bind_contextvars(worker=launch.name)
    _quiet_libraries()
    arena = None
    if launch.arena >= 0:
        arena = Arena.map(launch.arena, launch.slots, launch.slot_bytes)
        os.close(launch.arena)
    try:
        _role(launch.run)(Context(pipe, launch, settings, arena))
    except TaggingError as error:
        pipe.send_wait(Refused(one_line(error)))
        return REFUSED_STATUS
    except DeviceLost as error:
        _log.error("workers.device_lost", error=str(error))
        return BROKEN_STATUS
    except Exception:  # noqa: BLE001 - outermost: a traceback belongs into the log, as one event
        _log.exception("workers.crashed")
        return 1
    return 0
