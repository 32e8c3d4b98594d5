"""The downloading processes: started, given work, listened to, replaced when they die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeAlias

from common.errors import RetryableError, WorkerDied
from corpus.download.values import Answer, Ask, Found, Options

_ROOT = Path(__file__).resolve().parents[2]
_DEATHS_IN_A_ROW = 5
_Pipe: TypeAlias = "Connection[Ask | Options | None, Answer]"


class _Child:
    """One process; `asked` is what it has not answered."""

    def __init__(self, options: Options) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "corpus.download.child"]
        with theirs, _signals_blocked():
            self.process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is the command's
            )
        self.pipe: _Pipe = Connection(ours.detach())
        self.asked: set[str] = set()
        with suppress(OSError):  # it has died already: read as such later
            self.pipe.send(options)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Crew:
    """All processes.

    The thread that makes it must live as long as it: the kernel ends the processes with it.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._children = [_Child(options) for _ in range(options.processes)]
        self._deaths = 0

    @property
    def busy(self) -> int:
        """Downloads under way."""
        return sum(len(child.asked) for child in self._children)

    @property
    def free(self) -> int:
        """How many more can begin now."""
        return self._options.processes * self._options.connections - self.busy

    def send(self, ask: Ask) -> None:
        """Have the process with the least to do download this."""
        child = min(self._children, key=lambda child: len(child.asked))
        child.asked.add(ask.key)
        with suppress(OSError):  # it has died: `receive` will tell
            child.pipe.send(ask)

    def receive(self, timeout_s: float) -> list[Answer]:
        """What has ended since; the downloads of a process that died are failed ones.

        Raises:
            RetryableError: The processes die again and again.
        """
        answers: list[Answer] = []
        ready = wait([child.pipe for child in self._children], max(0.0, timeout_s))
        for index, child in enumerate(self._children):
            if child.pipe not in ready:
                continue
            try:
                while child.pipe.poll():
                    answer = child.pipe.recv()
                    child.asked.discard(answer.key)
                    answers.append(answer)
                    self._deaths = 0
            except (EOFError, OSError):
                answers += self._replace(index)
        return answers

    def close(self, patience_s: float) -> Iterator[Answer]:
        """End the processes; what they finish within the patience is given."""
        end = time.monotonic() + patience_s
        while self.busy and (left_s := end - time.monotonic()) > 0:
            yield from self.receive(min(left_s, 0.2))
        for child in self._children:
            child.kill()

    def _replace(self, index: int) -> list[Answer]:
        dead = self._children[index]
        dead.kill()
        self._deaths += 1
        if self._deaths >= _DEATHS_IN_A_ROW:
            raise RetryableError(
                f"downloading processes die as soon as they start (status {dead.process.poll()})"
            )
        self._children[index] = _Child(self._options)
        reason = (WorkerDied.__name__, "the downloading process died")
        return [Answer(key, Found("retryable", reason=reason)) for key in sorted(dead.asked)]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A Ctrl-C must not reach a process before it has learnt to leave it to us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
