"""Downloads in threads of this process, and the files on their way into the output folder.

    OUT/media/ab/abcd...png              content by its hash; appears whole
    OUT/.state/incoming/KEY.part        being downloaded
    OUT/.state/incoming/KEY-SHA256      downloaded, and not yet published

The middle name carries all that is known of a finished download, so that a process that is killed
right then has lost nothing.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import FetchRefused, FetchRetryable, MediaError
from common.files import file_digest
from common.post import Failure, Media
from common.urls import is_url
from corpus.download.values import Answer, Ask, Options, Status, UrlResult
from extractors.media.sniff import check_type, type_of
from workers.fetch import Fetcher

_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{64})")
# Types, and families of types, that are not their own extension.
_EXTENSIONS = {
    "QuickTime video": "mov",
    "M4A sound": "m4a",
    "jpeg": "jpg",
    "matroska": "mkv",
    "mpeg": "mpg",
    "mpegts": "ts",
    "asf": "wmv",
    "id3": "mp3",
    "jpeg2000": "jp2",
    "heif": "heic",
    "mpegvideo": "mpg",
}


def incoming_folder(out: Path) -> Path:
    """Return the folder of downloads that are not in their final place."""
    return out / ".state" / "incoming"


def classify(path: Path, sha256: str) -> UrlResult:
    """Return the type of a downloaded file, or the reason why it is of no use."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        kind = type_of(stream)
    if not size:
        return _refused("the file is empty")
    if kind is None or not kind.kinds:
        return _refused(f"no media: {kind.name if kind else 'unknown type of file'}")
    try:
        check_type(path, sorted(kind.kinds)[0])
    except MediaError as error:
        return _refused(str(error))
    extension = _EXTENSIONS.get(kind.name) or _EXTENSIONS.get(kind.family, kind.family)
    return UrlResult("ok", sha256, extension, size, kind.kinds, kind.name)


def _refused(message: str) -> UrlResult:
    return UrlResult("refused", reason=(MediaError.__name__, message))


def move_in_place(out: Path, incoming: str, result: UrlResult) -> bool:
    """Move a finished download to its final path; False when the same content is there already."""
    source = incoming_folder(out) / incoming
    target = out / result.path
    if present(out, result):
        source.unlink(missing_ok=True)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    return True


def present(out: Path, result: UrlResult, *, verify: bool = False) -> bool:
    """Return True when the content exists, by its size, or with `verify` by its hash."""
    path = out / result.path
    try:
        if path.stat().st_size != result.size_bytes:
            return False
        return not verify or file_digest(path) == result.sha256
    except OSError:
        return False


def left_over(out: Path) -> Iterator[tuple[str, str, UrlResult]]:
    """Yield downloads that an earlier run finished and did not record: key, name, result.

    What it had only begun is deleted, and so is what a power cut has broken.
    """
    folder = incoming_folder(out)
    for path in sorted(folder.iterdir()):
        named = _NAME.fullmatch(path.name)
        if named is None or file_digest(path) != named[2]:
            path.unlink()
            continue
        yield named[1], path.name, classify(path, named[2])


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
        """Return the number of downloads that can begin now."""
        return self._most - self.busy

    def start(self, ask: Ask) -> None:
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
            if not ask.local and not is_url(ask.source):
                raise FetchRefused("is a local path: pass --local to copy it")
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
            result = classify(done, sha256)
            if result.status != "ok":
                done.unlink()
            return Answer(ask.key, result, incoming=done.name if result.status == "ok" else "")
        except FetchRefused as error:
            return Answer(ask.key, _failed("refused", error))
        except FetchRetryable as error:
            ours, _, why = str(error).partition(_OURS)
            return Answer(
                ask.key,
                _failed("retryable", error),
                retry_after_s=error.retry_after_s,
                unreachable=error.unreachable,
                broken="" if ours else why,
            )
        except OSError as error:
            return Answer(ask.key, _failed("retryable", error), broken=error.strerror or str(error))

    def _copy(self, path: Path, part: Path) -> str:
        """Copy a local file, and return its hash."""
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise FetchRefused("local file: is none")
            source = path.open("rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no path"
            raise FetchRefused(f"local file: {reason}") from error
        with source, part.open("xb") as target:
            if about.st_size > (limit := self._options.fetch.max_bytes):
                raise FetchRefused(f"larger than fetch.max_bytes ({limit})")
            shutil.copyfileobj(source, target)
        return file_digest(part)


def _failed(status: Status, error: Exception) -> UrlResult:
    failure = Failure.of("fetch", error)
    return UrlResult(status, reason=(failure.type, failure.message))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
