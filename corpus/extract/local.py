"""The local engine: a pool of decoders and extractors, many posts in flight, batches across them.

A file that kills a native library costs its post, not the run: see `workers.runner`. Feature files
are read, merged and replaced under a lock of their folder, so that scripts for different modalities
may work on one root at once, on one machine or on several that share it.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from common.errors import FeatureError, RetryableError, TaggingError, WorkerDied
from common.files import locked, write_whole
from common.post import Failure, Features, Modality, Stream, modality_of
from config.settings import Settings
from corpus.extract.work import Entry, FailedPart, Result, Work
from corpus.runs import Interrupt
from extractors.feature_file import (
    Header,
    feature_path,
    features_bytes,
    read_features,
    read_header,
)

if TYPE_CHECKING:
    from workers.post_run import PostTags
    from workers.runner import PostRunner


_LOCK = ".lock"
_WORKER_NAME = re.compile(r"^worker \S+ ")


@dataclass(frozen=True)
class FeatureStore:
    """The feature files of a root, as one script sees them.

    Attributes:
        root: Of all files.
        modalities: Modalities that this script extracts.
        fingerprints: Of every stream that they have.
        retry_failed: Whether what failed for good before counts as not done.
        node: Name of this machine in results.
    """

    root: Path
    modalities: frozenset[Modality]
    fingerprints: Mapping[Stream, str]
    retry_failed: bool = False
    node: str = ""

    def find(self, work: Work) -> Result | None:
        """Return the result of an earlier run; None when the post must be extracted."""
        try:
            header = read_header(feature_path(self.root, work.post.post_id), work.post.post_id)
        except FeatureError:
            return None  # there is none, or it is broken: it is made again
        ours = {s: f for s, f in header.fingerprints.items() if modality_of(s) in self.modalities}
        if ours != dict(self.fingerprints):
            return None
        made = {modality_of(stream) for stream in ours}
        if any(header.inputs.get(m) != work.digests.get(m) for m in made):
            return None
        failures = {m: f for m, f in header.failures.items() if m in self.modalities}
        if failures and self.retry_failed:
            return None
        statuses = {m: s for m, s in header.statuses.items() if m in self.modalities}
        return Result(
            work.index,
            work.post.post_id,
            "there",
            statuses,
            _parts(work.post.post_id, failures),
            self.node,
        )

    def put(self, work: Work, features: Features) -> Result:
        """Merge new features into the post's file.

        Raises:
            FeatureError: The extractors gave what no feature file takes.
            OSError: The disk is full, or gone.
        """
        ours = self._own(work, features)
        path = feature_path(self.root, work.post.post_id)
        with locked(path.parent / _LOCK, timeout_s=-1):
            old = _old(self.root, work.post.post_id)
            # Not synced: that costs more than to extract a text. What a power cut leaves of a file
            # is known to be broken by its header, and made again.
            write_whole(path, self._merged(work, ours, old), sync=False, shared=True)
        failures = _parts(work.post.post_id, ours.failures)
        return Result(work.index, work.post.post_id, "done", ours.statuses, failures, self.node)

    def _own(self, work: Work, features: Features) -> Features:
        """Return this script's share, with the media that were lost before it."""
        failures = {
            m: _without_name(f) for m, f in features.failures.items() if m in self.modalities
        }
        statuses = {m: s for m, s in features.statuses.items() if m in self.modalities}
        for modality, failure in work.lost.items():
            failures.setdefault(modality, failure)
            if statuses.get(modality) == "missing":
                statuses[modality] = "failed"
        arrays = {s: a for s, a in features.arrays.items() if modality_of(s) in self.modalities}
        return replace(features, arrays=arrays, statuses=statuses, failures=failures)

    def _merged(self, work: Work, ours: Features, old: tuple[Header, Features] | None) -> bytes:
        made = {modality_of(stream) for stream in self.fingerprints}
        # What may pass is not finished: without a digest the next run tries it again.
        inputs = {
            m: work.digests[m]
            for m in made
            if m not in ours.failures or _is_final(ours.failures[m])
        }
        if old is None:
            own = ours if "text" in self.modalities else replace(ours, ocr_text=None)
            return features_bytes(own, self.fingerprints, inputs)
        header, old_features = old
        others: frozenset[Modality] = frozenset(header.statuses) - self.modalities
        fingerprints = {s: f for s, f in header.fingerprints.items() if modality_of(s) in others}
        merged = Features(
            post_id=ours.post_id,
            arrays={
                **{s: a for s, a in old_features.arrays.items() if modality_of(s) in others},
                **ours.arrays,
            },
            statuses={**{m: s for m, s in header.statuses.items() if m in others}, **ours.statuses},
            failures={**{m: f for m, f in header.failures.items() if m in others}, **ours.failures},
            ocr_text=ours.ocr_text if "text" in self.modalities else header.ocr_text,
        )
        digests = {m: d for m, d in header.inputs.items() if m in others}
        return features_bytes(merged, {**fingerprints, **self.fingerprints}, {**digests, **inputs})


def _old(root: Path, post_id: str) -> tuple[Header, Features] | None:
    try:
        header = read_header(feature_path(root, post_id), post_id)
        return header, read_features(root, post_id)
    except FeatureError:
        return None


def _parts(post_id: str, failures: Mapping[Modality, Failure]) -> tuple[FailedPart, ...]:
    return tuple(FailedPart(post_id, m, failures[m]) for m in sorted(failures))


def _is_final(failure: Failure) -> bool:
    """True when trying again is of no use; a post that killed two workers will kill a third."""
    return not failure.retryable or failure.type == WorkerDied.__name__


def _without_name(failure: Failure) -> Failure:
    """Drop the worker's name, which is chance: files must be the same for every run."""
    if failure.type != WorkerDied.__name__:
        return failure
    return replace(failure, message=_WORKER_NAME.sub("its worker ", failure.message))


# The time of a post counts from when it is queued behind others; its tasks have their own limits.
_POST_LIMIT_S = 24 * 3600.0
_POLL_S = 0.5

_Ended: TypeAlias = "queue.SimpleQueue[tuple[Work, Future[PostTags]]]"


class LocalEngine:
    """The engine on this machine; `open` it, `run` entries through it, `close` it.

    Args:
        force: Extract what is there, too.
        node: Name of this machine in results.
    """

    def __init__(
        self,
        settings: Settings,
        root: Path,
        modalities: frozenset[Modality],
        *,
        force: bool = False,
        retry_failed: bool = False,
        interrupt: Interrupt | None = None,
        node: str = "",
    ) -> None:
        self._settings, self._root, self._modalities = settings, root, modalities
        self._force, self._retry_failed, self._node = force, retry_failed, node
        self._interrupt = interrupt or Interrupt()
        processes = sum(group.processes for group in settings.workers.extractors)
        # Enough that full batches form and no process waits; arrays of each are held until written.
        self._limit = 16 * processes + 2 * settings.decode.processes
        self._runner: PostRunner | None = None
        self._store: FeatureStore | None = None

    def open(self) -> None:
        """Load the models, in processes of their own.

        Raises:
            ConfigError: Weights or devices are not to be had.
        """
        from workers.runner import PostRunner

        runner = PostRunner(
            self._settings, fuse=False, modalities=self._modalities, limit=self._limit
        )
        runner.start()
        self._runner = runner
        self._store = FeatureStore(
            self._root,
            self._modalities,
            dict(runner.fingerprints),
            self._retry_failed,
            self._node,
        )

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Yield results in the order in which they come.

        Raises:
            OSError: Features cannot be written.
            TaggingError: The workers have ended.
        """
        ended: _Ended = queue.SimpleQueue()
        open_ = 0
        for entry in entries:
            if self._interrupt.asked:
                break
            settled = self._settled(entry)
            if settled is not None:
                yield settled
                continue
            while open_ and (open_ >= self._limit or not ended.empty()):
                yield self._take(ended)
                open_ -= 1
            if isinstance(entry, Work):
                self._begin(entry, ended)
                open_ += 1
        while open_:
            yield self._take(ended)
            open_ -= 1

    def _settled(self, entry: Entry) -> Result | None:
        if isinstance(entry, Result):
            return entry
        return None if self._force else self._opened[1].find(entry)

    @property
    def _opened(self) -> tuple[PostRunner, FeatureStore]:
        if self._runner is None or self._store is None:
            raise RuntimeError("open() comes first")
        return self._runner, self._store

    def _begin(self, work: Work, ended: _Ended) -> None:
        future = self._opened[0].submit(work.post, deadline_s=_POST_LIMIT_S)
        future.add_done_callback(lambda done: ended.put((work, done)))

    def _take(self, ended: _Ended) -> Result:
        while True:
            try:
                work, future = ended.get(timeout=_POLL_S)  # wakes up for signals
                return self._finish(work, future)
            except queue.Empty:
                continue

    def _finish(self, work: Work, future: Future[PostTags]) -> Result:
        runner, store = self._opened
        try:
            return store.put(work, future.result().features)
        except CancelledError as error:
            raise RetryableError("the extraction was broken off") from error
        except TaggingError as error:
            if runner.trouble is not None:
                raise RetryableError(f"the workers have ended: {runner.trouble}") from error
            retryable = isinstance(error, RetryableError)
            part = FailedPart(
                work.post.post_id,
                None,
                Failure.of(error.stage or "extract", error, retryable=retryable),
            )
            return Result(work.index, work.post.post_id, "failed", {}, (part,), self._node)
