"""Downloads in threads of this process, each with the daemon's own fetcher and its limits."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import FetchRefused, FetchRetryable
from common.post import Failure, Media
from corpus.download.content import classify, incoming_folder
from corpus.download.values import Answer, Ask, Found, Options, Status
from workers.fetch.client import Fetcher

_CHUNK_BYTES = 1 << 20  # of a local file: as much as one read of a spinning disk is worth
_OURS = "spool: "  # how a Fetcher's error begins when our own disk failed


class Transfers:
    """The downloads under way; the answers come in the order in which they end."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._folder = incoming_folder(options.out)
        self._mode = 0o666 & ~_umask()
        self._asks: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._most = options.processes * options.connections
        self._threads = 0
        self.busy = 0

    @property
    def free(self) -> int:
        """How many more downloads can begin now."""
        return self._most - self.busy

    def start(self, ask: Ask) -> None:
        """Begin a download."""
        self.busy += 1
        if self.busy > self._threads:
            # Daemons: a download that still hangs after the last signal must not hold up the end.
            threading.Thread(target=self._work, daemon=True).start()
            self._threads += 1
        self._asks.put(ask)

    def receive(self, timeout_s: float) -> list[Answer]:
        """Wait for an answer, and return all that are there."""
        answers: list[Answer] = []
        try:
            answers.append(self._answers.get(timeout=max(0.0, timeout_s)))
            while True:
                answers.append(self._answers.get_nowait())
        except queue.Empty:
            self.busy -= len(answers)
            return answers

    def close(self, patience_s: float) -> Iterator[Answer]:
        """End the threads; yield what they finish within the patience."""
        end = time.monotonic() + patience_s
        while self.busy and (left_s := end - time.monotonic()) > 0:
            yield from self.receive(left_s)
        for _ in range(self._threads):
            self._asks.put(None)

    def _work(self) -> None:
        fetcher = Fetcher(self._options.fetch)
        while (ask := self._asks.get()) is not None:
            try:
                answer = self._download(fetcher, ask)
            except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
                answer = Answer(ask.key, _failed("retryable", error))
            self._answers.put(answer)
        fetcher.close()

    def _download(self, fetcher: Fetcher, ask: Ask) -> Answer:
        part = self._folder / f"{ask.key}.part"
        try:
            part.unlink(missing_ok=True)
            # One try: the waits between tries are the run's business, which sees the whole host.
            sha256 = (
                self._copy(Path(ask.source), part)
                if ask.local
                else fetcher.fetch(Media("image", ask.source), part, tries=1).sha256
            )
            # From here on a kill loses nothing: the name says all.
            done = self._folder / f"{ask.key}-{sha256}"
            part.replace(done)
            done.chmod(self._mode)
            with done.open("rb") as file:
                os.fsync(file.fileno())
            found = classify(done, sha256)
            if found.status != "ok":
                done.unlink()
            return Answer(ask.key, found, incoming=done.name if found.status == "ok" else "")
        except FetchRefused as error:
            return Answer(ask.key, _failed("refused", error))
        except FetchRetryable as error:
            text = str(error)
            return Answer(
                ask.key,
                _failed("retryable", error),
                retry_after_s=error.retry_after_s,
                unreachable=error.unreachable,
                broken=text.removeprefix(_OURS) if text.startswith(_OURS) else "",
            )
        except OSError as error:
            return Answer(ask.key, _failed("retryable", error), broken=error.strerror or str(error))

    def _copy(self, path: Path, part: Path) -> str:
        """Copy a local file, and return its hash."""
        try:
            source = path.open("rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no path"
            raise FetchRefused(f"local file: {reason}") from error
        limit = self._options.fetch.max_bytes
        digest, size = hashlib.sha256(), 0
        with source, part.open("xb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if size > limit:
                    part.unlink()
                    raise FetchRefused(f"larger than fetch.max_bytes ({limit})")
                target.write(chunk)
        return digest.hexdigest()


def _failed(status: Status, error: Exception) -> Found:
    failure = Failure.of("fetch", error)
    return Found(status, reason=(failure.type, failure.message))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
