"""A post to features and tags in this process: what the daemon does, without queue or workers.

It walks the same plan with the same task functions as the pool's workers, so a post gets the same
features and tags offline and online.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.errors import BundleError, FeatureError, TaggingError
from config.settings import Settings
from extractors.parts import slot_bytes
from workers.cache.features import FeatureCache
from workers.cache.store import GuardedStore
from workers.fetch.client import Fetcher
from workers.fetch.sources import is_url, local_file
from workers.fetch.spool import file_name
from workers.plan import PostPlan, Step
from workers.pool.arena import Arena
from workers.pool.fingerprints import mismatch
from workers.protocol import (
    CacheHits,
    CacheLookup,
    DecodeTask,
    ExtractTask,
    Failure,
    Features,
    Fetched,
    FetchTask,
    FuseTask,
    Media,
    Post,
    Stream,
    Tags,
    Task,
)
from workers.roles.tasks import Outcome, failure_of, run_decode, run_extract, run_fuse

if TYPE_CHECKING:
    from types import TracebackType

    from extractors.suite import ExtractorSuite
    from fusion.infer.inferer import Inferer


class LocalTagger:
    """Fetch, decode, extract and fuse in this process, one task after the other.

    Sources that are paths are read in place (for files that this machine's user names himself,
    never for posts of the platform); http and https are downloaded under `fetch`'s limits.
    """

    def __init__(self, settings: Settings, *, device: str | None = None) -> None:
        """Describe it; starts and loads nothing.

        ``device`` replaces that of the first extractor placement.
        """
        first = settings.workers.extractors[0]
        self._settings = settings
        self._device = device or first.device
        self._threads = first.threads
        self._arena: Arena | None = None
        self._suite: ExtractorSuite | None = None
        self._inferer: Inferer | None = None
        self._fetcher: Fetcher | None = None
        self._spool: tempfile.TemporaryDirectory[str] | None = None
        self._downloads = 0
        self._cache: FeatureCache | None = None

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Fingerprint of each stream, once loaded."""
        return self._loaded()[0].fingerprints

    @property
    def bundle(self) -> tuple[str, str]:
        """Name and version of the bundle, once loaded."""
        if self._inferer is None:
            raise RuntimeError("load() comes first")
        return self._inferer.name, self._inferer.version

    def load(self, *, fusion: bool = True) -> None:
        """Load the extractors, and the bundle unless only features are wanted.

        Raises:
            ConfigError: Weights are missing.
            BundleError: The bundle is missing, broken, or made for other features.
        """
        from extractors.suite import ExtractorSuite

        if self._suite is None:
            suite = ExtractorSuite(self._settings.features, self._device, threads=self._threads)
            suite.load()
            self._suite = suite
            # One slot: a media file's arrays are extracted before the next file is decoded.
            self._arena = Arena.private(1, slot_bytes(self._settings))
            if self._settings.cache.url is not None:
                cache = FeatureCache(GuardedStore.open(self._settings.cache), self._settings)
                cache.expect(suite.by_extractor)
                self._cache = cache
        if fusion and self._inferer is None:
            self._inferer = self._open_bundle(self._suite.fingerprints)

    def features(self, post: Post) -> Features:
        """The post's features.

        Raises:
            RetryableError: Nothing is usable, but a later try may do better.
            NothingUsable: Nothing is usable.
        """
        self._loaded()
        plan = PostPlan(
            post,
            self._settings.features,
            max_media=self._settings.fetch.max_media,
            cache=self._cache is not None,
            local=lambda source: not is_url(source),
        )
        steps = deque(plan.start())
        while steps:
            step = steps.popleft()
            outcome = self._run(step)
            if isinstance(outcome, Failure):
                follow = plan.failed(step, outcome)
            else:
                follow = plan.done(step, outcome)
            self._clean(step, follow)
            # Depth first: what was decoded is extracted before the slot is written again.
            steps.extendleft(reversed(follow))
        return plan.features()

    def tag(self, post: Post) -> Tags:
        """The post's tags.

        Raises:
            RetryableError: Nothing is usable, but a later try may do better.
            NothingUsable: Nothing is usable.
            FeatureError: The features do not fit the bundle.
        """
        return self.fuse(self.features(post))

    def fuse(self, features: Features) -> Tags:
        """The tags of a post whose features are there already.

        Raises:
            FeatureError: The features do not fit the bundle.
        """
        if self._inferer is None:
            raise RuntimeError("load() comes first")
        outcome = run_fuse(self._inferer, [FuseTask(features)])[0]
        if isinstance(outcome, Tags):
            return outcome
        reason = outcome.message if isinstance(outcome, Failure) else "no tags"
        raise FeatureError(f"post {features.post_id}: {reason}")

    def close(self) -> None:
        """Free models, memory and files."""
        store = self._cache.store if self._cache is not None else None
        for each in (self._suite, self._inferer, self._fetcher, self._arena, store):
            if each is not None:
                each.close()
        if self._spool is not None:
            self._spool.cleanup()
        self._suite = self._inferer = self._fetcher = self._arena = self._spool = None
        self._cache = None

    def __enter__(self) -> LocalTagger:
        """Use with ``with``; `load` is still the caller's."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # Parts ------------------------------------------------------------------------------------

    def _loaded(self) -> tuple[ExtractorSuite, Arena]:
        if self._suite is None or self._arena is None:
            raise RuntimeError("load() comes first")
        return self._suite, self._arena

    def _open_bundle(self, fingerprints: dict[Stream, str]) -> Inferer:
        from workers.roles.fuse import open_bundle

        inferer = open_bundle(self._settings.fusion, self._device)
        wrong = mismatch(inferer.fingerprints, fingerprints)
        if wrong is not None:
            inferer.close()
            raise BundleError(f"{self._settings.fusion.bundle}: {wrong}")
        return inferer

    def _run(self, step: Step) -> Outcome:
        try:
            outcome = self._execute(step.task)
        except TaggingError as error:
            outcome = failure_of(step.stage, error)
        if self._cache is not None:
            self._cache.learn(step.task, outcome)
        return outcome

    def _execute(self, task: Task) -> Outcome:
        suite, arena = self._loaded()
        if isinstance(task, CacheLookup):
            return self._cache.lookup(task) if self._cache is not None else CacheHits()
        if isinstance(task, FetchTask):
            return self._fetch(task.media)
        if isinstance(task, DecodeTask):
            in_slot = msgspec.structs.replace(task, slot=0)
            return run_decode(in_slot, self._settings.features, self._settings.decode, arena)
        if isinstance(task, ExtractTask):
            return run_extract(suite, [task], arena)[0]
        raise TypeError(f"{type(task).__name__} is no step of a plan")

    def _fetch(self, media: Media) -> Fetched:
        if not is_url(media.source):
            return local_file(media.source)
        if self._fetcher is None:
            self._fetcher = Fetcher(self._settings.fetch)
            self._spool = tempfile.TemporaryDirectory(prefix="insighttag-")
        if self._spool is None:
            raise RuntimeError("a downloader without a folder")
        self._downloads += 1
        return self._fetcher.fetch(media, Path(self._spool.name) / file_name(self._downloads))

    def _clean(self, step: Step, follow: Sequence[Step]) -> None:
        """Delete a download once no step holds it; a file that was read in place stays."""
        if step.path is None or self._spool is None:
            return
        path = Path(step.path)
        if path.parent == Path(self._spool.name) and step.path not in [s.path for s in follow]:
            path.unlink(missing_ok=True)
