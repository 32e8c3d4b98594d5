"""What each actor of Ray does: the local engine on its node, on the posts that it is given.

Its decoders and extractors are processes of their own, so that a file that kills one costs its
post. A post that kills the actor itself is found by the tries that the actors note.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, TaggingError, one_line
from common.logs import configure_logs
from common.post import Failure, Modality
from config.settings import Settings
from corpus.extract.local import LocalEngine
from corpus.extract.parts import ended, read_part, tries
from corpus.extract.values import FailedPart, Result, Work

IN, OUT = "item", "result"
"""Columns of the batches: a file of work; a `Result`, or why the run cannot go on, as JSON."""


@dataclass(frozen=True)
class Order:
    """What an actor is told when it is made; it pickles.

    Attributes:
        settings: As JSON.
        root: Of the feature files; every node sees it under this path.
        folder: Of the run's `PartFolder`.
        where: Working folder, which relative paths in the settings start from.
    """

    settings: str
    root: str
    wanted: frozenset[Modality]
    folder: str
    where: str
    force: bool
    retry_failed: bool


class ExtractActor:
    """A callable for `ray.data.Dataset.map_batches`."""

    def __init__(self, order: Order, node: str | None = None) -> None:
        """Load the models; a mistake is told by the first batch, as Ray would try again for ever.

        Args:
            order: What to do.
            node: Name of the machine; None asks Ray.
        """
        self._folder = Path(order.folder)
        self._node = node if node is not None else _node()
        self._engine: LocalEngine | None = None
        self._trouble: tuple[str, str] | None = None
        with contextlib.suppress(OSError):
            os.chdir(order.where)
        settings = Settings.model_validate_json(order.settings)
        configure_logs(settings.log.format, settings.log.level)
        engine = LocalEngine(
            settings,
            Path(order.root),
            order.wanted,
            force=order.force,
            retry_failed=order.retry_failed,
            node=self._node,
        )
        try:
            engine.open()
            self._engine = engine
        except TaggingError as error:
            self._trouble = _why(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Results of files of work, in any order."""
        if self._trouble is None:
            try:
                results = [result for path in batch[IN].tolist() for result in self._run(path)]
                return _column([result.as_json() for result in results])
            except (TaggingError, OSError) as error:
                self._trouble = _why(error)
        return _column([json.dumps({"trouble": self._trouble})])

    def _run(self, path: str) -> list[Result]:
        if self._engine is None:
            raise RuntimeError("no engine")
        works = read_part(path)
        if tries(self._folder, Path(path).name) == 1:
            return list(self._engine.run(works))
        # An actor has died of this file, or beside it: one at a time shows of which post.
        results: list[Result] = []
        for work in works:
            if tries(self._folder, f"post-{work.index}") == 1:
                results += self._engine.run([work])
                ended(self._folder, f"post-{work.index}")
            else:
                results.append(self._given_up(work))
        return results

    def _given_up(self, work: Work) -> Result:
        failure = Failure("extract", "WorkerDied", "its actor died of it twice", retryable=True)
        part = FailedPart(work.post.post_id, None, failure)
        return Result(work.index, work.post.post_id, "failed", {}, (part,), self._node)


def trouble_of(line: str) -> TaggingError | None:
    """Why the run cannot go on, where a row says so."""
    content = json.loads(line)
    if "trouble" not in content:
        return None
    kind, text = content["trouble"]
    return ConfigError(text) if kind == ConfigError.__name__ else TaggingError(text)


def _column(lines: Sequence[str]) -> dict[str, Any]:
    return {OUT: np.array(list(lines), dtype=object)}


def _why(error: TaggingError | OSError) -> tuple[str, str]:
    return type(error).__name__, one_line(error)


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8]
