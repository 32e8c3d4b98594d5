"""Long runs: one at a time in a folder, ended by a signal at a good moment."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from common.errors import ConfigError
from common.files import lock_file

_Stopper = TypeVar("_Stopper", bound="Stopper")

# A signal ends a wait within this time: a person does not notice it, and it costs no CPU.
_STEP_S = 0.1


class Stopper:
    """A context in which SIGINT and SIGTERM set `asked`; a second one ends the process at once."""

    signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = ""
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self: _Stopper) -> _Stopper:
        for number in self.signals:
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes, but no longer than this."""
        due = time.monotonic() + seconds
        while not self.asked and (left_s := due - time.monotonic()) > 0:
            time.sleep(min(left_s, _STEP_S))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)


class Interrupt(Stopper):
    """A `Stopper` whose second signal is a KeyboardInterrupt, so that processes can be ended.

    A closed terminal asks for an end, too.

    Attributes:
        patient: While false, as when models load, the first signal ends at once, too.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        super().__init__()
        self.patient = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.patient:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock while the block runs; refuse a second run, and a folder that takes no file."""
    try:
        handle = lock_file(lock)
    except TimeoutError as error:
        raise ConfigError(f"{what} is being written by another run") from error
    except OSError as error:
        raise ConfigError(f"{lock.parent}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        handle.release()
