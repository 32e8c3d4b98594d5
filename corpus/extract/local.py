"""The local engine: a pool of decoders and extractors, many posts in flight, batches across them.

Feature files are read, merged and replaced under a lock of their folder, so that scripts for
different modalities may work on one root at once, on one machine or on several that share it.
"""

from __future__ import annotations

import queue
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from common.errors import FeatureError, RetryableError, TaggingError, WorkerDied
from common.files import locked, write_whole
from common.post import Failure, Features, Modality, Status, Stream, modality_of
from common.post_set import PostSet
from corpus.extract.options import Options
from corpus.extract.work import MODALITIES_OF, Entry, FailedPart, Result, State, Work
from corpus.runs import Interrupt
from extractors.feature_file import Header, feature_path, features_bytes, read_features, read_header
from extractors.learned import learned_from, streams_of_post
from workers.post_run import PostTags
from workers.runner import PostRunner

K = TypeVar("K", bound=Stream)
V = TypeVar("V")

_LOCK = ".lock"
_WORKER_NAME = re.compile(r"^worker \S+ ")


@dataclass(frozen=True)
class FeatureStore:
    """The feature files of a root, as the script that extracts some modalities sees them.

    Attributes:
        fingerprints: Of every stream of the modalities.
        learned_from: Posts that the weights of each stream were trained on.
        retry_failed: What failed for good before counts as not done.
        node: Name of this machine in results.
    """

    root: Path
    modalities: frozenset[Modality]
    fingerprints: Mapping[Stream, str]
    learned_from: Mapping[Stream, PostSet] = field(default_factory=dict)
    retry_failed: bool = False
    node: str = ""

    def find(self, work: Work) -> Result | None:
        """Return the result of an earlier run; None when the post must be extracted."""
        try:
            header = read_header(feature_path(self.root, work.post.post_id), work.post.post_id)
        except FeatureError:
            return None  # there is none, or it is broken: it is made again
        ours = _of(header.fingerprints, self.modalities)
        same_inputs = all(
            header.inputs.get(m) == work.digests.get(m) for m in map(modality_of, ours)
        )
        failures = _of(header.failures, self.modalities)
        if ours != self.fingerprints or not same_inputs or (failures and self.retry_failed):
            return None
        return self._result(work, "there", _of(header.statuses, self.modalities), failures)

    def put(self, work: Work, features: Features) -> Result:
        """Merge new features into the post's file."""
        ours = self._own(work, features)
        path = feature_path(self.root, work.post.post_id)
        with locked(path.parent / _LOCK, timeout_s=-1):
            old = _old(self.root, work.post.post_id)
            # Not synced: that costs more than to extract a text. What a power cut leaves of a file
            # is known to be broken by its header, and made again.
            write_whole(path, self._merged(work, ours, old), sync=False, shared=True)
        return self._result(work, "done", ours.statuses, ours.failures)

    def _result(
        self,
        work: Work,
        state: State,
        statuses: Mapping[Modality, Status],
        failures: Mapping[Modality, Failure],
    ) -> Result:
        post_id = work.post.post_id
        parts = tuple(FailedPart(post_id, m, failures[m]) for m in sorted(failures))
        return Result(work.index, post_id, state, statuses, parts, self.node)

    def _own(self, work: Work, features: Features) -> Features:
        """Return this script's share, with the media that were lost before it."""
        own = _of(features.failures, self.modalities)
        failures = {m: _without_name(failure) for m, failure in own.items()}
        statuses = _of(features.statuses, self.modalities)
        for modality, failure in work.lost.items():
            failures.setdefault(modality, failure)
            if statuses.get(modality) == "missing":
                statuses[modality] = "failed"
        arrays = _of(features.arrays, self.modalities)
        return replace(features, arrays=arrays, statuses=statuses, failures=failures)

    def _merged(self, work: Work, ours: Features, old: tuple[Header, Features] | None) -> bytes:
        made = {modality_of(stream) for stream in self.fingerprints}
        learned = streams_of_post(work.post.post_id, self.learned_from)
        # What may pass is not finished: without a digest the next run tries it again.
        passing = {m for m, failure in ours.failures.items() if _may_pass(failure)}
        inputs = {m: work.digests[m] for m in made - passing}
        if old is None:
            own = ours if "text" in self.modalities else replace(ours, ocr_text=None)
            return features_bytes(own, self.fingerprints, inputs, learned)
        header, old_features = old
        others = frozenset(header.statuses) - self.modalities
        merged = Features(
            post_id=ours.post_id,
            arrays={**_of(old_features.arrays, others), **ours.arrays},
            statuses={**_of(header.statuses, others), **ours.statuses},
            failures={**_of(header.failures, others), **ours.failures},
            ocr_text=ours.ocr_text if "text" in self.modalities else header.ocr_text,
        )
        fingerprints = {**_of(header.fingerprints, others), **self.fingerprints}
        inputs = {**_of(header.inputs, others), **inputs}
        learned += tuple(s for s in header.learned_from if modality_of(s) in others)
        return features_bytes(merged, fingerprints, inputs, learned)


def _of(values: Mapping[K, V], modalities: frozenset[Modality]) -> dict[K, V]:
    """Return the values, by modality or stream, of some modalities."""
    return {key: value for key, value in values.items() if modality_of(key) in modalities}


def _old(root: Path, post_id: str) -> tuple[Header, Features] | None:
    try:
        header = read_header(feature_path(root, post_id), post_id)
        return header, read_features(root, post_id)
    except FeatureError:
        return None


def _may_pass(failure: Failure) -> bool:
    """Return True when trying again may help; a post that killed two workers will kill a third."""
    return failure.retryable and failure.type != WorkerDied.__name__


def _without_name(failure: Failure) -> Failure:
    """Drop the worker's name, which is chance: files must be the same for every run."""
    if failure.type != WorkerDied.__name__:
        return failure
    return replace(failure, message=_WORKER_NAME.sub("its worker ", failure.message))


# The time of a post counts from when it is queued behind others; its tasks have their own limits.
_POST_LIMIT_S = 24 * 3600.0
_POLL_S = 0.5

_Ended: TypeAlias = queue.SimpleQueue[tuple[Work, Future[PostTags]]]


class LocalEngine:
    """The engine on this machine; `open` it, `run` entries through it, `close` it."""

    def __init__(self, options: Options, interrupt: Interrupt, node: str = "") -> None:
        self._options, self._interrupt, self._node = options, interrupt, node
        settings = options.settings
        processes = sum(group.processes for group in settings.workers.extractors)
        # Enough that full batches form and no process waits; arrays of each are held until written.
        self._limit = 16 * processes + 2 * settings.decode.processes
        modalities = MODALITIES_OF[options.kind]
        self._runner = PostRunner(settings, fuse=False, modalities=modalities, limit=self._limit)
        self._store: FeatureStore | None = None

    def open(self) -> None:
        """Load the models, in processes of their own; once is enough."""
        if self._store is None:
            self._runner.start()
            options, modalities = self._options, MODALITIES_OF[self._options.kind]
            self._store = FeatureStore(
                options.features,
                modalities,
                _of(self._runner.fingerprints, modalities),
                _of(learned_from(options.settings.features), modalities),
                options.line.retry_failed,
                self._node,
            )

    def close(self) -> None:
        self._runner.close()

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Yield results in the order in which they come."""
        if self._store is None:
            raise RuntimeError("open() comes first")
        store, ended, open_ = self._store, _Ended(), 0
        for entry in entries:
            if self._interrupt.asked:
                break
            if isinstance(entry, Result):
                yield entry
                continue
            if not self._options.line.force and (earlier := store.find(entry)) is not None:
                yield earlier
                continue
            while open_ and (open_ >= self._limit or not ended.empty()):
                yield self._take(store, ended)
                open_ -= 1
            future = self._runner.submit(entry.post, deadline_s=_POST_LIMIT_S)
            future.add_done_callback(partial(_put, ended, entry))
            open_ += 1
        for _ in range(open_):
            yield self._take(store, ended)

    def _take(self, store: FeatureStore, ended: _Ended) -> Result:
        while True:
            with suppress(queue.Empty):
                work, future = ended.get(timeout=_POLL_S)  # wakes up for signals
                return self._finish(store, work, future)

    def _finish(self, store: FeatureStore, work: Work, future: Future[PostTags]) -> Result:
        try:
            return store.put(work, future.result().features)
        except CancelledError as error:
            raise RetryableError("the extraction was interrupted") from error
        except TaggingError as error:
            if self._runner.trouble is not None:
                raise RetryableError(f"the workers have ended: {self._runner.trouble}") from error
            retryable = isinstance(error, RetryableError)
            failure = Failure.of(error.stage or "extract", error, retryable=retryable)
            part = FailedPart(work.post.post_id, None, failure)
            return Result(work.index, work.post.post_id, "failed", {}, (part,), self._node)


def _put(ended: _Ended, work: Work, future: Future[PostTags]) -> None:
    ended.put((work, future))
