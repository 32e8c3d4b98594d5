"""One post on any pool: the plan (which tasks follow from which results) and its executor.

The King, the HTTP server, the offline scripts and ``insighttag tag`` all run posts through
`PostRuns`, so that a post gets the same features, tags and failures on every path. A run is one
attempt; `common.retry.RetryPolicy` decides about the next.

    media - fetch -> decode -+-> extract video | image | audio | asr ----+
                             '-> read (ocr) -> [joined over the media]   +-> Features -> fuse
    text ---------------------> extract text, extract ocr ---------------+

With a feature cache all of this is looked up first, and only the missing parts are computed:

    lookup -+-> [features from the cache] -------------------------------> Features -> fuse
            '-> fetch -> lookup by content -> decode -> extract what is missing

Extraction runs per media file and not per modality: a post never holds one slot while it waits
for another, so posts cannot deadlock on slots.

A permanent failure inside a post costs that modality. A retryable one costs the attempt, unless it
is the last one: then it costs the modality too, and the result says that it is partial.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import structlog

from common.errors import (
    DeadlineExceeded,
    FeatureError,
    NothingUsable,
    PermanentError,
    RetryableError,
    TaggingError,
)
from common.post import (
    MODALITIES,
    STREAMS,
    Failure,
    FeatureArray,
    Features,
    Media,
    MediaKind,
    Modality,
    OcrSource,
    Post,
    Status,
    Stream,
    TagResult,
    Tags,
    modality_of,
)
from common.retry import RetryPolicy
from common.urls import is_url
from config.features import FeatureSettings
from extractors.parts import PARTS, PartKind, parts_of
from workers.protocol import (
    NO_SLOT,
    STAGES,
    ArrayRef,
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    Decoded,
    DecodeTask,
    Done,
    Extracted,
    ExtractTask,
    Failed,
    Fetched,
    FetchTask,
    FuseTask,
    Result,
    Task,
    TaskPool,
)

_TEXT = -1  # media index of steps that belong to no media file


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the plan and the media file it belongs to."""

    task: Task
    media_index: int

    @property
    def path(self) -> str | None:
        """Return the downloaded file that it needs; it can be deleted once no step needs it."""
        match self.task:
            case CacheLookup(path=path) | DecodeTask(path=path):
                return path or None
        return None


class PostPlan:
    """State of one post between its arrival and its features."""

    def __init__(
        self,
        post: Post,
        settings: FeatureSettings,
        *,
        max_media: int,
        modalities: frozenset[Modality] | None = None,
        cache: bool = False,
        local: Callable[[str], bool] = lambda _source: False,
    ) -> None:
        """Plan a post.

        Args:
            post: The post.
            settings: Of the extractors.
            max_media: Media beyond it are left out.
            modalities: Only the inputs of these are fetched and extracted, the others are
                ``missing``; None is all of them. With it, `features` never raises: the caller has
                the rest of the post.
            cache: Use a feature cache.
            local: Tells the sources that are paths of files which the cache may read to identify
                them; must be False for every source that a post of the platform brings along.
        """
        self.post = post
        self._settings = settings
        self._on = [m for m in MODALITIES if m != "asr" or settings.asr.enabled]
        self._modalities = frozenset(self._on if modalities is None else modalities & {*self._on})
        self._partial = modalities is not None
        self._cache = cache
        self._local = local
        self._appended = settings.ocr_mode == "append" and "text" in self._modalities
        self._reads_pictures = (
            settings.ocr.enabled
            and post.ocr is None
            and (self._appended or "ocr" in self._modalities)
        )
        listed = post.media[:max_media]
        self.media_left_out = len(post.media) - len(listed)
        self._media: tuple[Media, ...] = tuple(m for m in listed if self._parts(m.kind))
        self.cache_lookups = len(self._media) if cache else 0
        self._running: set[Step] = set()
        self._running_of_media = dict.fromkeys(range(len(self._media)), 1)
        self._open_media = len(self._media)
        self._arrays: dict[tuple[Stream, int], FeatureArray] = {}
        self._ocr_of_media: dict[int, str] = {}
        self._failures: dict[Modality, list[Failure]] = {}
        self._texts_issued = False
        self._hits: dict[int, CacheHit] = {}
        self._cached_texts: dict[str, FeatureArray] = {}
        self._embedded: set[Modality] = set()

    @property
    def finished(self) -> bool:
        return not self._running and self._texts_issued

    def start(self) -> list[Step]:
        """Return the steps that can run at once."""
        has_content = bool(self._media or self.post.text.strip() or self.post.ocr)
        steps = [self._lookup_post()] if self._cache and has_content else self._begin()
        self._running.update(steps)
        return steps

    def done(self, step: Step, result: Result) -> list[Step]:
        """Take a step's result; return the steps that follow from it."""
        self._running.discard(step)
        follow: list[Step] = []
        match step.task, result:
            case CacheLookup() as task, _:
                return self._after_lookup(step, task, result)
            case _, Fetched() as fetched:
                follow = [self._after_fetch(step, fetched)]
            case task, Decoded() as decoded:
                self._add_failures(decoded.failures)
                if isinstance(task, DecodeTask):
                    follow = self._extract(step.media_index, decoded, task.sha256)
            case ExtractTask() as task, Extracted() as extracted:
                self._add_arrays(step, task, extracted)
        return self._advance(step, follow)

    def failed(self, step: Step, failure: Failure) -> list[Step]:
        """Take a step's failure: its modality is broken, the rest goes on."""
        self._running.discard(step)
        if isinstance(step.task, CacheLookup):
            return self._after_lookup(step, step.task, CacheHits())
        if isinstance(step.task, FetchTask):
            # The file is gone, but the features that the cache has of it are still good.
            self._use_hit(step.media_index)
        self._failures.setdefault(self._blamed(step), []).append(failure)
        return self._advance(step, [])

    def features(self) -> Features:
        """Return the post's features, once `finished`.

        Raises:
            RetryableError: Nothing is usable, but a later attempt may do better; never with
                ``modalities``.
            NothingUsable: Nothing is usable; never with ``modalities``.
            ValueError: Arrays of one stream do not fit together.
        """
        arrays: dict[Stream, FeatureArray] = {}
        for stream in STREAMS:
            if keys := sorted(key for key in self._arrays if key[0] == stream):
                arrays[stream] = np.concatenate([self._arrays[key] for key in keys])
        if not arrays and not self._partial:
            raise self._nothing_usable()
        present, failed = {modality_of(stream) for stream in arrays}, self._failures.items()
        return Features(
            post_id=self.post.post_id,
            arrays=arrays,
            statuses={m: self._status(m, m in present) for m in self._on},
            # A retryable one stands for its modality, and makes it partial.
            failures={m: next((f for f in fs if f.retryable), fs[0]) for m, fs in failed},
            ocr_text=self._ocr_text(),
            ocr=self._ocr_source(),
        )

    def _begin(self) -> list[Step]:
        """Return the first steps of everything that the cache does not have."""
        steps = [Step(FetchTask(m), i) for i, m in enumerate(self._media) if not self._complete(i)]
        self._open_media = len(steps)
        if not steps:
            return self._text_steps()
        if self._settings.ocr_mode == "separate":
            steps += self._embed("text", self.post.text)
        return steps

    def _lookup_post(self) -> Step:
        texts = frozenset[Modality](("text", "ocr")) & self._modalities
        media = tuple(
            CacheQuery(i, m, self._parts(m.kind), local=self._local(m.source))
            for i, m in enumerate(self._media)
        )
        mode = self._settings.ocr_mode
        return Step(CacheLookup(media, texts, self.post.text, self.post.ocr, mode), _TEXT)

    def _after_fetch(self, step: Step, fetched: Fetched) -> Step:
        """Decode the file; first look up its content, unless the lookup by source did that."""
        index = step.media_index
        media, hit = self._media[index], self._hits.get(index)
        sha256 = fetched.sha256 if self._cache else ""
        if hit is not None and self._local(media.source):
            sha256 = hit.sha256
        if hit is not None and hit.sha256 != sha256:
            hit = None
            del self._hits[index]  # the URL leads to another file now
        if sha256 and hit is None:
            query = CacheQuery(index, media, self._parts(media.kind), sha256)
            return Step(CacheLookup((query,), path=fetched.path), index)
        return Step(DecodeTask(media.kind, fetched.path, NO_SLOT, sha256), index)

    def _after_lookup(self, step: Step, task: CacheLookup, result: Result) -> list[Step]:
        if isinstance(result, CacheHits):
            self._hits.update({hit.index: hit for hit in result.media})
            self._cached_texts.update(result.texts)
        for query in task.media:
            if self._complete(query.index):
                self._use_complete_hit(query.index)
        if step.media_index == _TEXT:
            follow = self._begin()
            self._running.update(follow)
            return follow
        [query] = task.media
        if self._complete(query.index):
            return self._advance(step, [])
        decode = DecodeTask(query.media.kind, task.path, NO_SLOT, query.sha256)
        return self._advance(step, [Step(decode, query.index)])

    def _complete(self, index: int) -> bool:
        hit = self._hits.get(index)
        return hit is not None and hit.whole

    def _use_complete_hit(self, index: int) -> None:
        hit = self._hits[index]
        self._use_hit(index)
        if hit.failure is not None:
            blamed = self._blamed_media(self._media[index].kind)
            self._failures.setdefault(blamed, []).append(hit.failure)
        self._add_failures(hit.failures)

    def _use_hit(self, index: int) -> frozenset[PartKind]:
        """Take a file's arrays from the cache; return the parts that need no extraction."""
        hit = self._hits.get(index)
        if hit is None:
            return frozenset()
        for stream, array in hit.arrays.items():
            if len(array):
                self._arrays[(stream, index)] = array
        if hit.text is not None:
            self._ocr_of_media[index] = hit.text
        return hit.ready

    def _parts(self, kind: MediaKind) -> tuple[PartKind, ...]:
        """Return the parts that are extracted of a media file; if none, it is not fetched."""
        return tuple(part for part in parts_of(kind) if self._uses(part))

    def _uses(self, part: PartKind) -> bool:
        if part == "picture":
            return self._reads_pictures
        return PARTS[part].modality in self._modalities

    def _add_failures(self, failures: Mapping[Modality, Failure]) -> None:
        for modality, failure in failures.items():
            if modality in self._modalities:
                self._failures.setdefault(modality, []).append(failure)

    def _extract(self, index: int, decoded: Decoded, sha256: str) -> list[Step]:
        refs: dict[PartKind, list[ArrayRef]] = {}
        for part in decoded.parts:
            refs.setdefault(part.kind, []).append(part.ref)
        ready, kind = self._use_hit(index), self._media[index].kind
        steps = []
        for name in self._parts(kind):
            if name in refs and name not in ready:
                modality = PARTS[name].modality
                task = ExtractTask(modality, modality, tuple(refs[name]), "", sha256, kind)
                steps.append(Step(task, index))
        return steps

    def _add_arrays(self, step: Step, task: ExtractTask, extracted: Extracted) -> None:
        if extracted.array is not None and len(extracted.array):
            self._arrays[(task.modality, step.media_index)] = extracted.array
            for stream, array in extracted.also.items():
                self._arrays[(stream, step.media_index)] = array
        if extracted.text is not None:
            self._ocr_of_media[step.media_index] = extracted.text

    def _advance(self, step: Step, follow: list[Step]) -> list[Step]:
        """Count the media file's steps; the text steps wait for the last file."""
        if step.media_index != _TEXT:
            running = self._running_of_media[step.media_index] - 1 + len(follow)
            self._running_of_media[step.media_index] = running
            if running == 0:
                self._open_media -= 1
                if self._open_media == 0:
                    follow = follow + self._text_steps()
        self._running.update(follow)
        return follow

    def _text_steps(self) -> list[Step]:
        self._texts_issued = True
        texts = embedded_texts(self.post.text, self._ocr_text(), self._settings.ocr_mode)
        return [s for m, t in texts.items() if m not in self._embedded for s in self._embed(m, t)]

    def _embed(self, modality: Modality, text: str) -> list[Step]:
        if not text.strip() or modality not in self._modalities:
            return []
        self._embedded.add(modality)
        array = self._cached_texts.get(text)
        if array is None:
            return [Step(ExtractTask("text", modality, text=text), _TEXT)]
        if len(array):
            self._arrays[(modality, _TEXT)] = array
        return []

    def _ocr_text(self) -> str | None:
        return read_text(self.post.ocr, self._ocr_of_media)

    def _ocr_source(self) -> OcrSource:
        if self.post.ocr is not None:
            return "given"
        if not self._reads_pictures:
            return "off"
        return "read" if self._ocr_text() else "nothing_found"

    def _blamed(self, step: Step) -> Modality:
        if isinstance(step.task, ExtractTask):
            return step.task.modality
        return self._blamed_media(self._media[step.media_index].kind)

    def _blamed_media(self, kind: MediaKind) -> Modality:
        if kind in self._modalities:
            return kind
        first = self._parts(kind)[0]
        return "text" if first == "picture" and self._appended else PARTS[first].modality

    def _status(self, modality: Modality, present: bool) -> Status:
        if modality not in self._modalities:
            return "missing"
        if modality == "ocr" and self._settings.ocr_mode == "append":
            present = bool(self._ocr_text())  # it has no array: it is inside the text's
        if present:
            return "ok"
        return "failed" if modality in self._failures else "missing"

    def _nothing_usable(self) -> NothingUsable | RetryableError:
        if not self._failures:
            empty = NothingUsable("the post has no text and no media")
            empty.stage = "load"
            return empty
        first = next(iter(self._failures.values()))[0]
        reasons = {m: failures[0].message for m, failures in self._failures.items()}
        text = "; ".join(f"{modality}: {reason}" for modality, reason in reasons.items())
        retryable = any(f.retryable for failures in self._failures.values() for f in failures)
        error: NothingUsable | RetryableError = (
            RetryableError(f"nothing usable yet: {text}")
            if retryable
            else NothingUsable(f"nothing usable: {text}")
        )
        error.stage = first.stage
        error.reasons = {str(modality): reason for modality, reason in reasons.items()}
        return error


def read_text(ocr: str | None, ocr_of_media: Mapping[int, str]) -> str | None:
    """Return the text in a post's pictures, None if there is none.

    Args:
        ocr: The text that the post brings along; it replaces reading.
        ocr_of_media: Index of the media file -> text that OCR read in it.
    """
    if ocr is not None:
        return ocr
    lines = (ocr_of_media[i].strip() for i in sorted(ocr_of_media))
    return "\n".join(line for line in lines if line) or None


def embedded_texts(
    text: str, read: str | None, mode: Literal["append", "separate"]
) -> dict[Modality, str]:
    """Return modality -> the text that is embedded for it; a modality without text is left out."""
    texts: dict[Modality, str] = {"text": text, "ocr": read or ""}
    if mode == "append":
        texts = {"text": "\n".join(part for part in (text.strip(), read or "") if part)}
    return {modality: each for modality, each in texts.items() if each.strip()}


_NO_MEDIA = -1  # media index of the fusion's step

# Posts that go before an earlier one with a video, which takes as long as several: more than are in
# work by default. At half, a small post waits for some; at double, videos wait longer for them.
_VIDEO_LAG = 50

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PostTags:
    """Features and tags of a post.

    Attributes:
        fused: The tags; None where the runs do not fuse.
        timings_ms: Stage -> milliseconds by the clock that the post waited for it, in a queue or at
            work; of stages that run side by side the earliest counts, so that all add up to
            ``total``.
    """

    features: Features
    fused: Tags | None
    timings_ms: Mapping[str, int]

    @property
    def tags(self) -> Tags:
        """Return the tags; RuntimeError where the runs do not fuse."""
        if self.fused is None:
            raise RuntimeError(f"post {self.features.post_id}: the fusion was left out")
        return self.fused

    @property
    def result(self) -> TagResult:
        """Return the post's result, without the times; raises as `tags` does."""
        return TagResult.tagged(self.tags, self.features)


@dataclass(frozen=True, slots=True)
class PostFailed:
    """A failed attempt.

    Attributes:
        failure: For documents and logs.
        error: The same for a caller in this process.
    """

    failure: Failure
    error: TaggingError
    timings_ms: Mapping[str, int]


PostOutcome: TypeAlias = PostTags | PostFailed


@dataclass(slots=True, eq=False)
class PostRun:
    """One attempt at one post.

    Attributes:
        plan: Of this attempt.
        deadline: `time.monotonic` past which the attempt has failed.
        limit: The same for a person, for example ``king.post_deadline_s (300 s)``.
        last: No attempt follows: a retryable failure costs a modality and not the attempt.
        retry_by: `time.monotonic` past which no attempt follows either.
        turn: Place of its tasks among those of other posts, counted in posts; set by `PostRuns`.
        on_end: Called once, when the run is off the pool; not for a run that was dropped.
        began: `time.monotonic` that the total time counts from.
        tasks: Task ID -> step, of the tasks on the pool.
        downloads: Files that this run has to delete.
        seconds: Stage -> time that the post has waited for it.
        counted: `time.monotonic` up to which `seconds` counts.
    """

    plan: PostPlan
    deadline: float
    limit: str
    last: bool
    on_end: Callable[[PostRun, PostOutcome], None]
    priority: int = 0
    turn: int = 0
    retry_by: float = math.inf
    began: float = field(default_factory=time.monotonic)
    features: Features | None = None
    tasks: dict[int, Step] = field(default_factory=dict)
    downloads: set[str] = field(default_factory=set)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counted: float = field(default_factory=time.monotonic)

    def count(self) -> None:
        """Count the time until now for the stage that the post has waited for."""
        before, self.counted = self.counted, time.monotonic()
        self.seconds[self.stage] += self.counted - before

    @property
    def stage(self) -> str:
        """Return the earliest stage that the post waits for."""
        stages = [step.task.stage for step in self.tasks.values()]
        return min(stages, key=STAGES.index, default="fuse")

    @property
    def timings_ms(self) -> dict[str, int]:
        # Rounded down: the stages must not add up to more than the total.
        by_stage = {stage: int(seconds * 1000) for stage, seconds in self.seconds.items()}
        return {**by_stage, "total": int((time.monotonic() - self.began) * 1000)}


class PostRuns:
    """The posts on a pool, for the one thread that owns it."""

    def __init__(
        self,
        pool: TaskPool,
        *,
        fuse: bool = True,
        open_local: Callable[[str], Fetched] | None = None,
    ) -> None:
        """Take a pool; nothing runs yet.

        Args:
            pool: Of this thread.
            fuse: Follow features by tags.
            open_local: Opens a source that is a path, in place, or raises `PermanentError`; None
                leaves every source to the pool's downloader, which refuses paths.
        """
        self._pool = pool
        self._fuse = fuse
        self._open_local = open_local
        self._runs: set[PostRun] = set()
        self._by_task: dict[int, PostRun] = {}
        self._begun = itertools.count()

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[PostRun]:
        return iter(list(self._runs))

    def begin(self, run: PostRun) -> None:
        self._runs.add(run)
        slow = any(media.kind == "video" for media in run.plan.post.media)
        run.turn = next(self._begun) + _VIDEO_LAG * slow
        self._submit(run, run.plan.start())
        self._advance(run)  # a post without text and media has no step to wait for

    def drop(self, run: PostRun) -> None:
        """Take a run off the pool without an outcome."""
        self._runs.discard(run)
        for task_id in run.tasks:
            if self._by_task.pop(task_id, None) is not None:
                self._pool.cancel(task_id)
        run.tasks.clear()
        while run.downloads:
            _delete(run.downloads.pop())

    def expire(self) -> None:
        now = time.monotonic()
        for run in [run for run in self if run.deadline <= now]:
            self._expire(run)

    def handle(self, event: Done | Failed) -> None:
        """Take a task's end, and put the tasks that follow from it on the pool."""
        run = self._by_task.pop(event.task_id, None)
        if run is None:  # its run ended while this event was on its way
            if isinstance(event, Done):
                if isinstance(event.result, Fetched):
                    _delete(event.result.path)
                self._release(event.result)
            return
        if isinstance(event, Failed) and run.deadline <= time.monotonic():
            self._expire(run)  # tasks have the same deadline: the worker was only quicker to say so
            return
        run.count()
        step = run.tasks.pop(event.task_id)
        if isinstance(event, Done):
            self._done(run, step, event.result)
        else:
            self._failed(run, step, event.failure)

    def _expire(self, run: PostRun) -> None:
        message = f"the post ran past {run.limit}"
        failure = Failure(run.stage, DeadlineExceeded.__name__, message, retryable=True)
        self._fail(run, failure, DeadlineExceeded(message))

    def _done(self, run: PostRun, step: Step, result: Result) -> None:
        if isinstance(result, Tags) and run.features is not None:
            self._end(run, PostTags(run.features, result, run.timings_ms))
            return
        if isinstance(result, Fetched):
            run.downloads.add(result.path)
        self._follow(run, step, run.plan.done(step, result))
        # Only now: the slot must not be free before the tasks that read it are on the pool.
        self._release(result)
        self._advance(run)

    def _failed(self, run: PostRun, step: Step, failure: Failure) -> None:
        last = run.last or time.monotonic() >= run.retry_by
        costs_attempt = not last and RetryPolicy.costs_attempt(step.task.stage, failure)
        if isinstance(step.task, FuseTask) or costs_attempt:
            kind = RetryableError if failure.retryable else FeatureError
            self._fail(run, failure, kind(failure.message))
            return
        self._follow(run, step, run.plan.failed(step, failure))
        self._advance(run)

    def _follow(self, run: PostRun, ended: Step, follow: Sequence[Step]) -> None:
        """Submit the steps that follow; delete a download that none of them needs."""
        if ended.path in run.downloads and all(step.path != ended.path for step in follow):
            run.downloads.discard(ended.path)
            _delete(ended.path)
        self._submit(run, follow)

    def _submit(self, run: PostRun, steps: Sequence[Step]) -> None:
        todo = deque(steps)
        while todo:
            step = todo.popleft()
            source = step.task.media.source if isinstance(step.task, FetchTask) else None
            if source is not None and self._open_local is not None and not is_url(source):
                try:
                    todo += run.plan.done(step, self._open_local(source))
                except PermanentError as error:
                    todo += run.plan.failed(step, Failure.of("fetch", error))
                continue
            order = {"priority": run.priority, "turn": run.turn}
            task_id = self._pool.submit(step.task, deadline=run.deadline, **order)
            run.tasks[task_id], self._by_task[task_id] = step, run

    def _advance(self, run: PostRun) -> None:
        """Fuse the features, once every step of the plan has ended."""
        if run.tasks or not run.plan.finished:
            return
        try:
            run.features = run.plan.features()
        except TaggingError as error:
            retryable = isinstance(error, RetryableError)
            self._fail(run, Failure.of(error.stage, error, retryable=retryable), error)
        except ValueError as mismatch:  # arrays of one stream that differ in width
            misfit = FeatureError(f"the features do not fit together: {mismatch}")
            self._fail(run, Failure.of("extract", misfit), misfit)
        else:
            if self._fuse:
                self._submit(run, [Step(FuseTask(run.features), _NO_MEDIA)])
            else:
                self._end(run, PostTags(run.features, None, run.timings_ms))

    def _fail(self, run: PostRun, failure: Failure, error: TaggingError) -> None:
        error.stage = failure.stage
        self._end(run, PostFailed(failure, error, run.timings_ms))

    def _end(self, run: PostRun, outcome: PostOutcome) -> None:
        self.drop(run)
        run.on_end(run, outcome)

    def _release(self, result: Result) -> None:
        if isinstance(result, Decoded) and result.parts:
            self._pool.release(result.parts[0].ref.slot)


def _delete(path: str) -> None:
    """Delete a download, which may be gone already."""
    try:
        os.unlink(path)  # noqa: PTH108 - for each file of each post: a Path costs as much again
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("workers.spool_file_left", error=error.strerror)
