"""A downloading process: many connections, one pipe to the parent.

    python -m corpus.download.child FD PARENT

Started by `crew.Crew` only. The main thread reads the pipe; the threads answer on it in turn.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from common.errors import FetchRefused, FetchRetryable
from common.post import Failure, Media
from corpus.download.content import classify, incoming_folder
from corpus.download.values import Answer, Ask, Found, Options
from workers.fetch.client import Fetcher
from workers.roles.loop import die_with_parent, ignore_signals, set_title

_Pipe: TypeAlias = "Connection[Answer, Ask | Options | None]"
_CHUNK_BYTES = 1 << 20
_OURS = "spool: "  # how a Fetcher begins when it is our disk that failed


class _BrokenDisk(Exception):
    """Nothing can be written: no download can succeed."""


class Downloads:
    """The threads of one process."""

    def __init__(self, options: Options, pipe: _Pipe) -> None:
        self._options = options
        self._pipe = pipe
        self._speaking = threading.Lock()
        self._folder = incoming_folder(options.out)
        self._mode = 0o666 & ~_umask()
        self._todo: queue.SimpleQueue[Ask | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"download-{i}", daemon=True)
            for i in range(options.connections)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, ask: Ask) -> None:
        """Queue a download."""
        self._todo.put(ask)

    def finish(self) -> None:
        """Let the threads end what they have begun."""
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        fetcher = Fetcher(self._options.fetch)
        while (ask := self._todo.get()) is not None:
            try:
                answer = self._download(fetcher, ask)
            except Exception as error:  # noqa: BLE001 - the loop: a download costs only itself
                answer = Answer(ask.key, _failed("retryable", error))
            with self._speaking, suppress(OSError):  # the parent is gone: so are we
                self._pipe.send(answer)
        fetcher.close()

    def _download(self, fetcher: Fetcher, ask: Ask) -> Answer:
        part = self._folder / f"{ask.key}.part"
        try:
            part.unlink(missing_ok=True)
            sha256 = self._copy(ask, part) if ask.local else _fetch(fetcher, ask, part)
            # From here on nothing is lost by a kill: the name says all.
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
            return Answer(
                ask.key,
                _failed("retryable", error),
                retry_after_s=error.retry_after_s,
                unreachable=error.unreachable,
            )
        except (OSError, _BrokenDisk) as error:
            text = getattr(error, "strerror", None) or str(error)
            return Answer(ask.key, _failed("retryable", error), broken=text)

    def _copy(self, ask: Ask, part: Path) -> str:
        """Take a local file; gives its hash."""
        try:
            source = Path(ask.source).open("rb")  # noqa: SIM115 - closed below
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


def _fetch(fetcher: Fetcher, ask: Ask, part: Path) -> str:
    """Download one file; gives its hash. The parent does the trying again, with its waits."""
    try:
        return fetcher.fetch(Media("image", ask.source), part, tries=1).sha256
    except FetchRetryable as error:
        if str(error).startswith(_OURS):
            raise _BrokenDisk(str(error).removeprefix(_OURS)) from error
        raise


def _failed(status: str, error: Exception) -> Found:
    failure = Failure.of("fetch", error)
    reason = (failure.type, failure.message)
    return Found("refused" if status == "refused" else "retryable", reason=reason)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def main(arguments: list[str]) -> int:
    """Serve downloads until told to stop or the parent is gone."""
    descriptor, parent = map(int, arguments)
    ignore_signals()
    die_with_parent(parent)
    set_title("download")
    pipe: _Pipe = Connection(descriptor)
    options = pipe.recv()
    if not isinstance(options, Options):
        return 1
    downloads = Downloads(options, pipe)
    try:
        while isinstance(ask := pipe.recv(), Ask):
            downloads.add(ask)
    except (EOFError, OSError):
        return 1
    downloads.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
