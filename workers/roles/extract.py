"""An extractor process: the models of one placement on one device, batching across posts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import ConfigError
from common.fingerprint import packed
from extractors.suite import ExtractorSuite
from workers.cache.features import FeatureCache
from workers.cache.guarded import GuardedStore
from workers.cache.writer import CacheWriter
from workers.pool.arena import Arena
from workers.pool.pipe import Pipe
from workers.protocol import Extracted, ExtractTask, Task
from workers.roles.batch import Outcome
from workers.roles.loop import Context, serve
from workers.roles.tasks import run_extract


class _Extractors:
    def __init__(self, context: Context, arena: Arena) -> None:
        launch = context.launch
        self._suite = ExtractorSuite(
            context.settings.features, launch.device, launch.extractors, threads=launch.threads
        )
        self._arena = arena
        self._settings = context.settings
        self._writer: CacheWriter | None = None

    def load(self) -> Mapping[str, str]:
        self._suite.load()
        if self._settings.cache.url is not None:
            cache = FeatureCache(GuardedStore.open(self._settings.cache), self._settings)
            cache.expect(self._suite.by_extractor)
            self._writer = CacheWriter(cache)
        return {"fingerprints": packed(self._suite.by_extractor)}

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        wanted = [task for task in tasks if isinstance(task, ExtractTask)]
        outcomes = run_extract(self._suite, wanted, self._arena)
        if self._writer is not None:
            for task, outcome in zip(wanted, outcomes, strict=True):
                if isinstance(outcome, Extracted):
                    self._writer.keep(task, outcome)
        return outcomes

    def between(self, pipe: Pipe) -> float | None:
        return None

    def told(self, message: object) -> None:
        pass

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._suite.close()
        self._arena.close()


def run(context: Context) -> None:
    """Serve extract tasks.

    Raises:
        ConfigError: The King passed no slots.
    """
    if context.arena is None:
        raise ConfigError("an extractor needs the slots")
    serve(context, _Extractors(context, context.arena))
