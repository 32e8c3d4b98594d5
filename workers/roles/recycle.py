"""When a worker process has served enough: a fresh one takes over before leaks add up."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from config.settings import WorkerSettings

_MIB = 2**20
_WARM_TASKS = 200  # by then allocators and caches have their size
_LOOK_EVERY_TASKS = 50


class Recycler:
    """Counts a process's tasks and watches its growth; asked between two batches."""

    def __init__(
        self, settings: WorkerSettings, resident_bytes: Callable[[], int] | None = None
    ) -> None:
        """Begin to count.

        Args:
            settings: ``recycle_tasks`` and ``recycle_growth_mb``; 0 switches either off.
            resident_bytes: How much memory the process holds; None asks the system.
        """
        self._settings = settings
        self._resident_bytes = resident_bytes or _resident_bytes
        self._tasks = 0
        self._look_at = _WARM_TASKS
        self._base_bytes: int | None = None

    def served(self, n_tasks: int) -> str | None:
        """Count a batch's tasks; gives the reason to end the process, where there is one."""
        self._tasks += n_tasks
        most = self._settings.recycle_tasks
        if most and self._tasks >= most:
            return f"served {self._tasks} tasks (workers.recycle_tasks {most})"
        if not self._settings.recycle_growth_mb or self._tasks < self._look_at:
            return None
        self._look_at = self._tasks + _LOOK_EVERY_TASKS
        now_bytes = self._resident_bytes()
        if self._base_bytes is None:
            self._base_bytes = now_bytes
        growth_mb = (now_bytes - self._base_bytes) / _MIB
        limit_mb = self._settings.recycle_growth_mb
        if growth_mb > limit_mb:
            return f"grew by {growth_mb:.0f} MiB (workers.recycle_growth_mb {limit_mb})"
        return None


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
