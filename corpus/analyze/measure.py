"""One media file ─► what is known of it: headers of video and sound, pixels of pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

from common.errors import MediaError
from common.files import file_digest
from common.post import MediaKind
from corpus.analyze.facts import MediaFact

_NUMBERS = re.compile(r"\d+(?:[.×]\d+)*")
_MICROSECONDS = 1_000_000
DIED = "the reader died of it"


@dataclass(frozen=True, slots=True)
class Task:
    """A file to measure.

    Attributes:
        name: What the file is called in the state.
        sha256: Of its content, where a manifest says so; empty where it is to be found.
        max_pixels: A larger picture is not decoded.
    """

    name: str
    path: Path
    kind: MediaKind
    sha256: str = ""
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a task; `size_bytes` and `mtime_ns` tell later whether the file is the same."""

    task: Task
    fact: MediaFact
    size_bytes: int
    mtime_ns: int


def measure(task: Task) -> Measured:
    """Measure a file; what is wrong with it becomes its reason.

    Raises:
        OSError: It cannot be read.
    """
    stat = task.path.stat()
    sha256 = task.sha256 or file_digest(task.path)
    fact = MediaFact(sha256, task.kind, stat.st_size)
    try:
        fact = _picture(task, fact) if task.kind == "image" else _container(task, fact)
    except MediaError as error:
        fact = replace(fact, reason=class_of(str(error)))
    return Measured(task, fact, stat.st_size, stat.st_mtime_ns)


def class_of(reason: str) -> str:
    """A reason without its numbers: failures of one class count as one."""
    return _NUMBERS.sub("N", reason)


def measure_all(tasks: Iterable[Task], processes: int) -> Iterator[Measured | tuple[Task, str]]:
    """Measure files in child processes, in any order; a file that cannot be read gives its reason.

    A file that a child dies of costs that child alone: those in flight are tried again, one by one.
    """
    waiting = iter(tasks)
    more = True
    while more:
        suspects: list[Task] = []
        more = False
        with _pool(processes) as pool:
            flying: dict[Future[Measured], Task] = {}
            try:
                for task in waiting:
                    more = True
                    flying[pool.submit(measure, task)] = task
                    if len(flying) >= 4 * processes:
                        yield from _landed(flying, suspects)
                    if suspects:
                        break
                else:
                    more = False
            except BrokenProcessPool:
                suspects.append(task)
            while flying:
                yield from _landed(flying, suspects)
        for task in suspects:
            yield from _alone(task)


def _landed(
    flying: dict[Future[Measured], Task], suspects: list[Task]
) -> Iterator[Measured | tuple[Task, str]]:
    done, _ = wait(flying, return_when=FIRST_COMPLETED)
    for future in done:
        task = flying.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool:
            suspects.append(task)
        except OSError as error:
            yield task, f"cannot be read: {error.strerror or error}"


def _alone(task: Task) -> Iterator[Measured | tuple[Task, str]]:
    with _pool(1) as pool:
        try:
            yield pool.submit(measure, task).result()
        except BrokenProcessPool:
            stat = task.path.stat()
            sha256 = task.sha256 or file_digest(task.path)
            fact = MediaFact(sha256, task.kind, stat.st_size, reason=DIED)
            yield Measured(task, fact, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            yield task, f"cannot be read: {error.strerror or error}"


def _pool(processes: int) -> ProcessPoolExecutor:
    # A fork would carry the parent's database along, and OpenCV's threads do not survive one.
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin)


def _begin() -> None:
    import signal
    import threading

    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent would leave its children waiting for tasks for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _picture(task: Task, fact: MediaFact) -> MediaFact:
    from corpus.analyze.looks import look_of
    from extractors.media.pictures import picture_size, read_pictures
    from extractors.media.sniff import check_type

    family = check_type(task.path, "image").family
    width, height = picture_size(task.path)
    fact = replace(fact, width=width, height=height, codec=family)
    pixels = next(iter(read_pictures(task.path, max_pixels=task.max_pixels)))
    return replace(fact, look=look_of(pixels))


def _container(task: Task, fact: MediaFact) -> MediaFact:
    from extractors.media.containers import find_stream, open_container
    from extractors.media.sniff import check_type

    found = check_type(task.path, task.kind)
    with open_container(task.path, found) as container:
        video, sound = find_stream(container, "video"), find_stream(container, "audio")
        main = video if task.kind == "video" else sound
        if main is None:
            what = "video stream" if task.kind == "video" else "sound"
            raise MediaError(f"{found.name} has no {what}")
        duration_s: float | None = None
        if main.duration and main.time_base:
            duration_s = float(main.duration * main.time_base)
        elif container.duration:
            duration_s = container.duration / _MICROSECONDS
        fact = replace(
            fact,
            duration_s=None if duration_s is None else round(duration_s, 3),
            codec=str(main.codec_context.name),
        )
        if task.kind == "video":
            fact = replace(
                fact,
                width=int(main.codec_context.width),
                height=int(main.codec_context.height),
                sound=str(sound.codec_context.name) if sound is not None else "",
            )
    return fact
