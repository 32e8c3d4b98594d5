"""The loop of roles that wait for others: threads do the work, the main thread has the channel."""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress

from workers.pool.channel import Channel
from workers.protocol import Command, Ready, Reply, Stop

_FINISH_S = 2.0
"""Time that begun work gets after `Stop`. The King waits longer than that before it kills; a
download that needs more is begun again by the next King anyway."""


class ThreadedRole(ABC):
    """Base of a role whose tasks run in threads.

    A subclass says in `worker` what a thread does with a message; from there it answers with
    `reply`. The other hooks run in the main thread.
    """

    def __init__(self, threads: int, name: str) -> None:
        """Describe it; starts nothing."""
        self.waiting: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._run_thread, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]

    @abstractmethod
    def worker(self) -> AbstractContextManager[Callable[[Command], None]]:
        """Return what one thread does with a message, and with it what only that thread uses."""

    def accept(self, message: Command) -> Reply | None:
        """Queue a message, or answer it at once."""
        self.waiting.put(message)
        return None

    def settle(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """Return the replies to send: those of the threads, and any that are due by themselves."""
        return replies

    def next_timer(self) -> float | None:
        """Return when `settle` is due without a reply, `time.monotonic()`; None for never."""
        return None

    def reply(self, reply: Reply) -> None:
        """Hand a reply to the main thread; from any thread."""
        self._replies.put(reply)
        with suppress(BlockingIOError):  # full: the main thread will wake anyway
            os.write(self._wake_out, b"r")

    def serve(self, channel: Channel[Command]) -> None:
        """Work until told to stop or the King is gone."""
        for thread in self._threads:
            thread.start()
        channel.send_wait(Ready())
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        poller.register(channel.fileno(), select.POLLIN)
        while True:
            timer = self.next_timer()
            poller.poll(None if timer is None else max(0.0, timer - time.monotonic()) * 1000 + 1)
            for message in channel.receive():
                if isinstance(message, Stop):
                    self._finish()
                    self._send_replies(channel)
                    return
                reply = self.accept(message)
                if reply is not None:
                    channel.send_wait(reply)
            if channel.closed:
                return
            self._send_replies(channel)

    def _send_replies(self, channel: Channel[Command]) -> None:
        with suppress(BlockingIOError):
            while os.read(self._wake_in, 4096):
                pass
        replies: list[Reply] = []
        with suppress(queue.Empty):
            while True:
                replies.append(self._replies.get_nowait())
        for reply in self.settle(replies):
            channel.send_wait(reply)

    def _finish(self) -> None:
        """Let the threads end what they have begun."""
        for _ in self._threads:
            self.waiting.put(None)
        end = time.monotonic() + _FINISH_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run_thread(self) -> None:
        with self.worker() as work:
            while (message := self.waiting.get()) is not None:
                work(message)
