"""Measuring of media files: headers of video and sound, pixels of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common.errors import MediaError
from common.files import file_digest
from common.post import MediaKind
from common.processes import process_pool

_NUMBERS = re.compile(r"\d+(?:[.×]\d+)*")
_MICROSECONDS = 1_000_000
DIED = "the reader died of it"
# Tasks in flight for each process: with 1 it waits between two, more than 4 are read again for
# nothing when a file kills its reader.
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class MediaFact:
    """One media file as a post uses it.

    Attributes:
        sha256: Of its content, in hex; empty where there is no file.
        reason: Why it is broken or missing, a class of failures; None when it is fine.
        width: In pixels, as it is shown; 0 for sound.
        duration_s: Of video and sound; None where the file does not say.
        codec: Of the picture, the video stream, or a sound file's stream.
        sound: Codec of a video's sound; empty when it has none.
        look: What `corpus.analyze.looks.look_of` gave for a picture; None for what has none.
    """

    sha256: str
    kind: MediaKind
    size_bytes: int = 0
    reason: str | None = None
    width: int = 0
    height: int = 0
    duration_s: float | None = None
    codec: str = ""
    sound: str = ""
    look: bytes | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A file to measure, by its name in the state; a manifest may know its hash already."""

    name: str
    path: Path
    kind: MediaKind
    sha256: str = ""
    max_pixels: int = 100_000_000


class Measured(NamedTuple):
    """The result of a task; size and time tell later whether the file is the same."""

    task: Task
    fact: MediaFact
    mtime_ns: int


class Unreadable(NamedTuple):
    """A task whose file cannot be read."""

    task: Task
    reason: str


def measure(task: Task, reason: str | None = None) -> Measured:
    """Measure a file; what is wrong with it becomes its reason.

    With a reason that is known before it is hashed, and not opened.
    """
    stat = task.path.stat()
    sha256 = task.sha256 or file_digest(task.path)
    fact = MediaFact(sha256, task.kind, stat.st_size, reason)
    try:
        if reason is None:
            fact = _picture(task, fact) if task.kind == "image" else _container(task, fact)
    except MediaError as error:
        fact = replace(fact, reason=class_of(str(error)))
    return Measured(task, fact, stat.st_mtime_ns)


def class_of(reason: str) -> str:
    """Return a reason without its numbers: failures of one class count as one."""
    return _NUMBERS.sub("N", reason)


def measure_all(tasks: Iterable[Task], processes: int) -> Iterator[Measured | Unreadable]:
    """Measure files in child processes, in any order.

    A file that a child dies of costs that child alone: those in flight are tried again, one by one.
    """
    waiting = iter(tasks)
    while True:
        suspects: list[Task] = []
        with process_pool(processes, _use_one_thread) as pool:
            in_flight: dict[Future[Measured], Task] = {}
            for task in waiting:
                try:
                    in_flight[pool.submit(measure, task)] = task
                except BrokenProcessPool:
                    suspects.append(task)
                if len(in_flight) >= _AHEAD * processes:
                    yield from _ended(in_flight, suspects)
                if suspects:
                    break
            while in_flight:
                yield from _ended(in_flight, suspects)
        if not suspects:
            return
        for task in suspects:
            with process_pool(1, _use_one_thread) as pool:
                killers: list[Task] = []
                yield from _ended({pool.submit(measure, task): task}, killers)
            for killer in killers:
                yield measure(killer, DIED)


def _ended(
    in_flight: dict[Future[Measured], Task], suspects: list[Task]
) -> Iterator[Measured | Unreadable]:
    """Yield the tasks that have ended, at least one; of those without an answer, see `suspects`."""
    done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
    for future in done:
        task = in_flight.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool:
            suspects.append(task)
        except OSError as error:
            yield Unreadable(task, f"cannot be read: {error.strerror or error}")


def _use_one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)  # the processes are what runs in parallel


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

    container_type = check_type(task.path, task.kind)
    with open_container(task.path, container_type) as container:
        video, sound = find_stream(container, "video"), find_stream(container, "audio")
        main = video if task.kind == "video" else sound
        if main is None:
            what = "video stream" if task.kind == "video" else "sound"
            raise MediaError(f"{container_type.name} has no {what}")
        if main.duration and main.time_base:
            fact = replace(fact, duration_s=round(float(main.duration * main.time_base), 3))
        elif container.duration:
            fact = replace(fact, duration_s=round(container.duration / _MICROSECONDS, 3))
        context = main.codec_context
        fact = replace(fact, codec=str(context.name))
        if task.kind == "video":
            name = str(sound.codec_context.name) if sound is not None else ""
            fact = replace(fact, width=int(context.width), height=int(context.height), sound=name)
    return fact
