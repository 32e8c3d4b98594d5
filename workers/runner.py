"""Posts through a pool of workers, without queue or database: for HTTP and the offline scripts.

    with PostRunner(settings) as runner:
        futures = [runner.submit(post) for post in posts]  # waits while too many are in flight
        for future in futures:
            tagged = future.result()

One thread owns the pool and runs the posts on it (`workers.post_run`), as the daemon's does. A post
has as many attempts as in the daemon, with the same back-off, within its time limit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from common.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    PermanentError,
    RetryableError,
    TaggingError,
)
from common.post import Failure, Modality, Post, Stream, TagResult
from common.progress import told_if_long
from common.urls import is_url
from config.features import ExtractorName, FeatureSettings
from config.settings import Settings
from workers.fetch import local_file
from workers.pool.pool import ProcessPool
from workers.post_run import PostFailed, PostOutcome, PostPlan, PostRun, PostRuns, PostTags
from workers.protocol import (
    Done,
    Failed,
    PoolEvent,
    PoolReady,
    PoolRefused,
    TaskPool,
    WorkerView,
)

# Deadlines, retries and cancelled posts are looked at this often: at double, HTTP's shortest
# deadlines end visibly late; at half, an idle server wakes up twice as often for nothing.
_POLL_S = 0.25

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Submission:
    """A submitted post.

    Attributes:
        deadline: `time.monotonic` past which the post has failed, attempts and pauses included.
        attempt: 1 for the first.
        due: `time.monotonic` at which the attempt begins.
        run: The attempt on the pool; None before it and between two of them.
    """

    post: Post
    limit_s: float
    began: float = field(default_factory=time.monotonic)
    future: Future[PostTags] = field(default_factory=Future)
    attempt: int = 1
    due: float = 0.0
    run: PostRun | None = None

    @property
    def deadline(self) -> float:
        return self.began + self.limit_s

    def settle(self, outcome: PostTags | TaggingError) -> None:
        """Resolve the future, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, PostTags):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class PostRunner:
    """A runner of posts on a pool of workers; `start` it, `submit` posts, `close` it.

    URLs are downloaded by the pool's downloader under `fetch`'s limits; sources that are paths
    are read in place by the decoders, and are never deleted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        fuse: bool = True,
        modalities: frozenset[Modality] | None = None,
        pool: TaskPool | None = None,
        local_root: Path | None = None,
        limit: int = 32,
        post_limit_s: float | None = None,
    ) -> None:
        """Describe it; starts nothing.

        Args:
            settings: Of the pool, and of the features.
            fuse: Give tags; without, there is no fusion worker, and no bundle.
            modalities: Only these, and only their extractors are loaded; None: all.
            pool: The workers; None takes real ones.
            local_root: The only folder whose files may be read in place; None: any file that
                this process may read, for sources that this machine's user names himself.
            limit: Posts in flight at most.
            post_limit_s: Time that a post may take; None takes ``king.post_deadline_s``.
        """
        self._settings = settings
        self._modalities = modalities
        self._pool: TaskPool = pool or ProcessPool(
            settings, fuse=fuse, extractors=extractors_of(modalities, settings.features)
        )
        self._open_local = partial(local_file, root=local_root)
        self._runs = PostRuns(self._pool, fuse=fuse, open_local=self._open_local)
        self._policy = settings.king.retry
        self._limit = limit
        self._post_limit_s = (
            post_limit_s if post_limit_s is not None else settings.king.post_deadline_s
        )
        self._room = threading.Condition()
        self._in_flight = 0
        self._inbox: deque[_Submission] = deque()
        self._submissions: set[_Submission] = set()  # begun, and not yet settled
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._started = threading.Event()  # loaded, or ended
        self._ended_by: TaggingError | None = None

    @property
    def ready(self) -> bool:
        return self._pool.ready and self.trouble is None and not self._stopping.is_set()

    @property
    def trouble(self) -> str | None:
        return str(self._ended_by) if self._ended_by is not None else self._pool.refused

    @property
    def ended_by(self) -> TaggingError | None:
        """Return the reason that no post can be run any more: a ConfigError, or one that passes."""
        return self._ended_by

    @property
    def bundle(self) -> tuple[str, str] | None:
        return self._pool.bundle

    @property
    def fingerprints(self) -> Mapping[Stream, str]:
        return self._pool.fingerprints

    @property
    def workers(self) -> list[WorkerView]:
        return self._pool.workers

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def start(self, *, wait: bool = True) -> None:
        """Start the workers.

        Args:
            wait: Return when they have loaded; without, at once: see `ready` and `trouble`.

        Raises:
            ConfigError: The pool refuses the configuration, weights or bundle.
        """
        if self._thread is None:
            # The workers die with this thread: it lives as long as they may.
            self._thread = threading.Thread(target=self._run, name="runner", daemon=True)
            self._thread.start()
        if not wait:
            return
        with told_if_long("loading the models"):
            self._started.wait()
        if self._ended_by is not None:
            self.close()
            raise type(self._ended_by)(str(self._ended_by))

    def submit(
        self, post: Post, *, deadline_s: float | None = None, wait_s: float | None = None
    ) -> Future[PostTags]:
        """Run a post; cancelling the future breaks it off.

        The future fails with `NothingUsable` or `RetryableError` where no modality could be used
        (its `reasons` name them), with `DeadlineExceeded`, or with `FeatureError`; the error's
        `stage` says where.

        Args:
            post: With URLs or local paths as sources.
            deadline_s: Time that it may take; None takes the runner's.
            wait_s: Time to wait while `limit` posts are in flight; None: until there is room.

        Raises:
            Busy: There was no room in time.
            TaggingError: The runner has ended, and why.
        """
        limit_s = deadline_s if deadline_s is not None else self._post_limit_s
        with self._room:
            if not self._room.wait_for(self._has_room, wait_s):
                raise Busy(f"{self._limit} posts are in flight already")
            if self._ended_by is not None:
                raise type(self._ended_by)(str(self._ended_by))
            if self._thread is None or self._stopping.is_set():
                raise RetryableError("the workers are not running")
            self._in_flight += 1
            submission = _Submission(post, limit_s)
            self._inbox.append(submission)
        submission.future.add_done_callback(self._wake_if_cancelled)
        self._pool.wake()
        return submission.future

    def run(self, post: Post) -> PostTags:
        """Run one post and wait for it; raises what the future of `submit` fails with."""
        return self.submit(post).result()

    def close(self) -> None:
        """Cancel the posts in flight and end the workers; may be called again."""
        self._stopping.set()
        with self._room:
            self._room.notify_all()
        if self._thread is None:
            self._pool.stop(0)
        else:
            self._pool.wake()
            self._thread.join()

    def __enter__(self) -> PostRunner:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # After Ctrl-C, too: a model that is being loaded, or runs, cannot be interrupted.
        with told_if_long("stopping: waiting for the models to finish what they have begun"):
            self.close()

    def _has_room(self) -> bool:
        ended = self._stopping.is_set() or self._ended_by is not None
        return ended or self._in_flight < self._limit

    def _wake_if_cancelled(self, future: Future[PostTags]) -> None:
        if future.cancelled():
            self._pool.wake()

    def _run(self) -> None:
        """Run the thread: everything below runs in it."""
        try:
            self._pool.start()
            while not self._stopping.is_set():
                self._begin_due()
                for event in self._pool.poll(_POLL_S):
                    self._handle(event)
                self._runs.expire()
                self._drop_cancelled()
        except TaggingError as error:
            self._end_all(error)
        except BaseException as error:  # noqa: BLE001 - the thread's end: callers wait for it
            _log.exception("runner.thread_died")
            self._end_all(RetryableError(f"the workers' thread has ended: {type(error).__name__}"))
        finally:
            self._pool.stop(self._settings.workers.shutdown_timeout_s)
            self._end_all(RetryableError("the workers have been stopped"))

    def _handle(self, event: PoolEvent) -> None:
        match event:
            case Done() | Failed():
                self._runs.handle(event)
            case PoolReady():
                self._started.set()
            case PoolRefused(message=message, mistake=mistake):
                self._end_all((ConfigError if mistake else RetryableError)(message))

    def _begin_due(self) -> None:
        while self._inbox:
            self._submissions.add(self._inbox.popleft())
        now = time.monotonic()
        for submission in [s for s in self._submissions if s.run is None and s.due <= now]:
            longest_s = self._policy.longest_delay_s(submission.attempt)
            submission.run = PostRun(
                plan=self._plan(submission.post),
                deadline=submission.deadline,
                limit=f"{submission.limit_s:g} s",
                last=self._policy.is_last(submission.attempt),
                on_end=partial(self._attempt_ended, submission),
                # Assumes that another attempt takes as long as this one.
                retry_by=(now + submission.deadline - longest_s) / 2,
                began=submission.began,
            )
            self._runs.begin(submission.run)

    def _attempt_ended(self, submission: _Submission, _run: PostRun, outcome: PostOutcome) -> None:
        submission.run = None
        if isinstance(outcome, PostTags):
            self._settle(submission, outcome)
        elif not self._tries_again(submission, outcome):
            self._settle(submission, outcome.error)

    def _tries_again(self, submission: _Submission, failed: PostFailed) -> bool:
        if isinstance(failed.error, DeadlineExceeded):
            return False
        if not self._policy.tries_again(failed.failure, submission.attempt):
            return False
        due = time.monotonic() + self._policy.delay_s(submission.attempt)
        if due >= submission.deadline:
            return False
        _log.info(
            "runner.post_retried",
            post_id=submission.post.post_id,
            attempt=submission.attempt,
            stage=failed.failure.stage,
            error=failed.failure.message,
        )
        submission.attempt, submission.due = submission.attempt + 1, due
        return True

    def _drop_cancelled(self) -> None:
        for submission in [s for s in self._submissions if s.future.cancelled()]:
            if submission.run is not None:
                self._runs.drop(submission.run)
            self._settle(submission, RetryableError("cancelled"))

    def _end_all(self, error: TaggingError) -> None:
        with self._room:
            self._ended_by = self._ended_by or error
            self._room.notify_all()
        self._started.set()
        for run in self._runs:
            self._runs.drop(run)
        while self._inbox:
            self._submissions.add(self._inbox.popleft())
        for submission in list(self._submissions):
            self._settle(submission, error)

    def _settle(self, submission: _Submission, outcome: PostTags | TaggingError) -> None:
        self._submissions.discard(submission)
        with self._room:  # before the future: its caller finds room for the next post
            self._in_flight -= 1
            self._room.notify()
        submission.settle(outcome)

    def _plan(self, post: Post) -> PostPlan:
        return PostPlan(
            post,
            self._settings.features,
            max_media=self._settings.fetch.max_media,
            modalities=self._modalities,
            cache=self._settings.cache.url is not None,
            local=self._is_local,
        )

    def _is_local(self, source: str) -> bool:
        """Return True when a source is a file that may be read in place."""
        try:
            return not is_url(source) and bool(self._open_local(source))
        except PermanentError:
            return False


def result_of(runner: PostRunner, post: Post) -> TagResult:
    """Run one post and return its result, which may say why the post failed."""
    try:
        return runner.run(post).result
    except TaggingError as error:
        failure = Failure.of(error.stage or "load", error)
        return TagResult.failed(post.post_id, runner.bundle or ("", ""), failure)


def extractors_of(
    modalities: Collection[Modality] | None, features: FeatureSettings
) -> frozenset[ExtractorName] | None:
    """Return the extractors that give these modalities; None: all."""
    if modalities is None:
        return None
    names: set[ExtractorName] = set(modalities)
    if "ocr" in names or ("text" in names and features.ocr_mode == "append"):
        names |= {"ocr", "text"}  # the text in pictures is embedded as text
    return frozenset(names)
