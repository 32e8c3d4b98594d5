"""Chunks of posts through one tagger in this process, or through several in processes of theirs.

Process i of N takes every N-th chunk, so results come back in the order of the input whatever
their number; which posts share a batch does not depend on it either.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from common import errors
from common.errors import TaggingError, WorkerDied
from fusion.infer.input import Bad, Labelled
from fusion.infer.outputs import Result

P = TypeVar("P", bound=Labelled)
P_contra = TypeVar("P_contra", bound=Labelled, contravariant=True)
Outcome: TypeAlias = Result | Bad

_AHEAD = 2  # chunks that each process is given before its first result is taken
_END_S = 10.0


class Tagger(Protocol[P_contra]):
    """Posts ─► their tags; one bad post costs only itself."""

    def run(self, posts: Sequence[P_contra]) -> list[Outcome]:
        """As many outcomes, in order."""
        ...

    def close(self) -> None:
        """Free its models."""
        ...


Maker: TypeAlias = Callable[[str], Tagger[Any]]
"""Makes a loaded tagger on a device; pickles."""


def chunked(posts: Iterable[P | Bad], size: int) -> Iterator[list[P | Bad]]:
    """Chunks of a size; the last may be smaller."""
    iterator = iter(posts)
    while chunk := list(islice(iterator, size)):
        yield chunk


def run_chunks(
    maker: Maker, devices: Sequence[str], chunks: Iterable[list[P | Bad]]
) -> Iterator[list[Outcome]]:
    """The outcomes of every chunk, in order.

    Args:
        maker: Makes the taggers.
        devices: One for each process; a single one is used in this process.
        chunks: Posts, and what is known to be bad.

    Raises:
        TaggingError: A tagger could not be made.
        WorkerDied: A process has died.
    """
    if len(devices) == 1:
        tagger = maker(devices[0])
        try:
            for chunk in chunks:
                yield _outcomes(tagger, chunk)
        finally:
            tagger.close()
        return
    crew: list[_Process[P]] = [_Process(maker, device, i) for i, device in enumerate(devices)]
    try:
        waiting: deque[_Process[P]] = deque()
        for index, chunk in enumerate(chunks):
            if len(waiting) == _AHEAD * len(crew):
                yield waiting.popleft().take()
            crew[index % len(crew)].give(chunk)
            waiting.append(crew[index % len(crew)])
        while waiting:
            yield waiting.popleft().take()
    finally:
        for member in crew:
            member.end()


def _outcomes(tagger: Tagger[P], chunk: Sequence[P | Bad]) -> list[Outcome]:
    found = iter(tagger.run([post for post in chunk if not isinstance(post, Bad)]))
    return [post if isinstance(post, Bad) else next(found) for post in chunk]


class _Process(Generic[P]):
    """A tagger in a process of its own, which ends when this process does."""

    def __init__(self, maker: Maker, device: str, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._name = f"process {index} on {device}"
        self._process = context.Process(
            target=_serve, args=(theirs, maker, device), name=self._name, daemon=True
        )
        self._process.start()
        theirs.close()

    def give(self, chunk: list[P | Bad]) -> None:
        """Hand over a chunk."""
        try:
            self._pipe.send(chunk)
        except OSError:
            self._died()

    def take(self) -> list[Outcome]:
        """The outcomes of the earliest chunk that is out."""
        try:
            found = self._pipe.recv()
        except (EOFError, OSError):
            self._died()
        if isinstance(found, tuple):
            kind, message = found
            raise getattr(errors, kind, TaggingError)(message)
        outcomes: list[Outcome] = found
        return outcomes

    def end(self) -> None:
        """Close the pipe, which ends the process; kill it if it does not."""
        self._pipe.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            found = self._pipe.recv()  # what it said before it went
            if isinstance(found, tuple):
                raise getattr(errors, found[0], TaggingError)(found[1])
        self._process.join(_END_S)
        raise WorkerDied(f"{self._name} died (exit code {self._process.exitcode})")


def _serve(pipe: Connection, maker: Maker, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; we are told
    # A closed pipe: the parent is done, or dead.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            tagger = maker(device)
            try:
                given: SimpleQueue[Any] = SimpleQueue()
                Thread(target=_take_in, args=(pipe, given), daemon=True).start()
                while (chunk := given.get()) is not None:
                    pipe.send(_outcomes(tagger, chunk))
            finally:
                tagger.close()
        except TaggingError as error:
            pipe.send((type(error).__name__, str(error)))


def _take_in(pipe: Connection, given: SimpleQueue[Any]) -> None:
    """Take chunks off the pipe at once, and at its end None.

    Without it both ends could wait in ``send``, each for the other to read what no longer fits.
    """
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                given.put(pipe.recv())
    finally:
        given.put(None)
