"""A decoder process: hostile files meet native libraries here, and nowhere else.

The damage of a file is bounded in three ways: memory by the kernel (RLIMIT_DATA), time by the King
(it kills), and results by the size of a slot.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from common.errors import ConfigError, MediaError
from common.post import Failure
from workers.pool.arena import Arena
from workers.pool.channel import Channel
from workers.protocol import Command, DecodeTask, Task
from workers.roles.loop import Context, Retire, serve
from workers.roles.tasks import Outcome, failure_of, run_decode

_log = structlog.get_logger()
_MIB = 1 << 20
_PAGES_OF_DATA = 5  # column of /proc/self/statm: data and stack, what RLIMIT_DATA counts


class _Decoder:
    def __init__(self, context: Context, arena: Arena) -> None:
        self._settings = context.settings
        self._arena = arena
        self._spent = False

    def load(self) -> Mapping[str, str]:
        import av
        import cv2

        import extractors.media.decode  # noqa: F401  - so that the limit below counts from here

        cv2.setNumThreads(1)
        av.logging.set_level(None)  # ffmpeg's own lines name files and mean nothing to a person
        limit_memory(self._settings.decode.memory_mb)
        return {}

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        return [self._one(task) for task in tasks if isinstance(task, DecodeTask)]

    def _one(self, task: DecodeTask) -> Outcome:
        try:
            return run_decode(task, self._settings.features, self._settings.decode, self._arena)
        except MemoryError:
            self._spent = True
            limit = self._settings.decode.memory_mb
            message = f"needs more memory than decode.memory_mb ({limit})"
            return Failure("decode", MediaError.__name__, message)
        except Exception as error:  # noqa: BLE001 - the loop: a file costs only itself
            return failure_of("decode", error)

    def between_batches(self, channel: Channel[Command]) -> float | None:
        if self._spent:
            raise Retire  # its memory may be fragmented
        return None

    def control(self, message: Command) -> None:
        pass

    def close(self) -> None:
        self._arena.close()


def limit_memory(megabytes: int) -> None:
    """Limit the growth of this process's private memory; beyond it malloc fails."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[_PAGES_OF_DATA])
    limit = pages * resource.getpagesize() + megabytes * _MIB
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def run(context: Context) -> None:
    """Serve decode tasks.

    Raises:
        ConfigError: The King passed no slots.
    """
    if context.arena is None:
        raise ConfigError("a decoder needs the slots")
    serve(context, _Decoder(context, context.arena))
