"""The roles that work in batches: decode, extract and fuse. `workers.local` uses their functions.

torch, the codecs and the bundles are imported only in the process that needs them: a decoder, where
hostile files meet native libraries, holds nothing else.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import structlog

from common.errors import (
    BundleError,
    ConfigError,
    FeatureError,
    MediaError,
    RetryableError,
    TaggingError,
    one_line,
)
from common.files import new_folder
from common.fingerprint import mismatch, packed, unpacked
from common.post import Failure, Stream, Tags
from config.features import FeatureSettings
from config.settings import DecodeSettings, FusionSettings, Settings
from config.tag_rules import TagRules
from extractors.suite import ExtractorSuite
from fusion.bundle.folder import shadow_folder
from workers.cache.entries import GuardedStore
from workers.cache.features import FeatureCache
from workers.pool.channel import Arena, Channel
from workers.protocol import (
    BundleLoaded,
    Command,
    Decoded,
    DecodeTask,
    Expect,
    Extracted,
    ExtractTask,
    FuseTask,
    Launch,
    Part,
    Task,
)
from workers.roles.loop import Context, Handler, Outcome, Retire, failure_of, run_batch, serve

if TYPE_CHECKING:
    from fusion.infer.inferer import Inferer

_MIB = 1 << 20
_PAGES_OF_DATA = 5  # column of /proc/self/statm: data and stack, what RLIMIT_DATA counts

_MOST_WAITING_BYTES = 64 << 20
"""Results that wait for the cache; beyond it they are not written. 64 MiB is a minute of a fast
GPU's features; a cache that is that far behind will not catch up, and half as much would drop
results when a bucket is slow for some seconds."""

_ENTRY_BYTES = 4096
"""Least that a waiting result counts for: Python's own objects around a short text."""

_FLUSH_S = 2.0
"""Time to write the waiting results at the end, less than the King waits before it kills."""

_LOCAL_ERRNOS = (errno.ENOENT, errno.ESTALE, errno.EMFILE, errno.ENFILE)
"""Errors of opening a downloaded file that say nothing about it: somebody emptied the spool, or no
descriptors are left. Not EIO and ENOMEM, which FFmpeg gives for damaged files too."""

_BUNDLE_FILES = ("bundle.yaml", "model.safetensors", "labels.json")
_KEPT_TAGS = "tags.yaml"
"""Name of the file of `fusion.tags` in the copy of the last good bundle."""
_Signature: TypeAlias = list[tuple[int, int, int] | None]

_QUICK_SHADOW_S = 0.1
"""A batch of the bundle on trial that takes longer is followed by a rest as long, in which posts
are only served: slow bundles get half of the process's time. At half, larger ensembles skip posts
on a host that is busy for a moment; at double, posts wait twice as long for what nobody reads."""

_NO_SCORES = np.zeros(0)
"""In place of the scores of a bundle on trial, which nobody reads: they are most of a message."""

_log = structlog.get_logger()


def run_decode(
    task: DecodeTask, features: FeatureSettings, limits: DecodeSettings, arena: Arena
) -> Decoded:
    """Decode a media file into its slot.

    Raises:
        MediaError: The file cannot be decoded, or gives more than a slot holds.
        RetryableError: It cannot be opened, for a reason that may pass.
    """
    from extractors.media.decode import decode_media

    writer = arena.writer(task.slot)
    try:
        media = decode_media(task.kind, task.path, features, limits, writer)
    except (MediaError, OSError) as error:
        cause = error.__cause__ if isinstance(error, MediaError) else error
        if isinstance(cause, OSError) and cause.errno in _LOCAL_ERRNOS:
            raise RetryableError(f"the file cannot be opened: {cause.strerror}") from error
        raise
    parts = tuple(Part(kind, writer.ref(array)) for kind, array in media.parts)
    return Decoded(parts, dict(media.failures), media.on_gpu)


def run_extract(suite: ExtractorSuite, tasks: Sequence[ExtractTask], arena: Arena) -> list[Outcome]:
    """Run one extractor on a batch of its tasks; a bad one fails alone, unless by DeviceLost."""

    def run(batch: Sequence[ExtractTask]) -> list[Extracted]:
        results = suite.run(batch[0].extractor, [_input_of(task, arena) for task in batch])
        return [_extracted(result) for result in results]

    return run_batch("extract", run, tasks)


def _input_of(task: ExtractTask, arena: Arena) -> Any:
    if task.extractor == "text":
        return task.text
    views = [arena.view(ref) for ref in task.refs]
    if task.extractor == "ocr":
        return tuple(views)
    if not views:
        raise FeatureError(f"{task.extractor}: nothing to extract from")
    return views[0] if len(views) == 1 else np.concatenate(views)  # (n_i, ...) -> (n, ...)


def _extracted(result: Any) -> Extracted:
    """Wrap one array, the streams of a video, or the text that OCR read."""
    match result:
        case str():
            return Extracted(text=result)
        case Mapping():
            streams = dict(result)
            return Extracted(array=streams.pop("video"), also=streams)
    return Extracted(array=result)


def run_fuse(inferer: Inferer, tasks: Sequence[FuseTask]) -> list[Outcome]:
    """Predict the tags of a batch of posts; a bad one fails alone, unless by DeviceLost."""
    return run_batch("fuse", lambda batch: inferer.predict([t.features for t in batch]), tasks)


class _Decoder(Handler):
    """The damage of a file is bounded in memory by the kernel, in time by the King, who kills."""

    def __init__(self, settings: Settings, arena: Arena) -> None:
        self._settings = settings
        self._arena = arena
        self._spent = False

    def load(self) -> Mapping[str, str]:
        import av
        import cv2

        from extractors.media import decode  # noqa: F401  - so that the limit below counts from here

        cv2.setNumThreads(1)
        if self._settings.decode.hwaccel != "none":
            from extractors.media.hwaccel import gpu_decoder

            gpu_decoder(os.getpid())  # CUDA takes memory of which no file is to blame
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


def limit_memory(megabytes: int) -> None:
    """Limit the growth of this process's private memory; beyond it malloc fails."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[_PAGES_OF_DATA])
    limit = pages * resource.getpagesize() + megabytes * _MIB
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


class CacheWriter:
    """A thread that writes results to the cache, so that the device never waits for it."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._queue: deque[tuple[ExtractTask, Extracted, int]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
        self._thread.start()

    def keep(self, task: ExtractTask, result: Extracted) -> None:
        """Queue a result; never waits."""
        arrays = [a for a in (result.array, *result.also.values()) if a is not None]
        size = sum(a.nbytes for a in arrays) + len(result.text or "") + _ENTRY_BYTES
        with self._changed:
            if self._bytes + size <= _MOST_WAITING_BYTES:
                self._queue.append((task, result, size))
                self._bytes += size
                self._changed.notify()
                return
            self._dropped += 1
            if self._dropped & (self._dropped - 1) == 0:  # 1, 2, 4, 8 and so on
                _log.warning("cache.too_slow", not_kept=self._dropped)

    def close(self) -> None:
        """Write the waiting results for `_FLUSH_S` at most, then end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                task, result, size = self._queue.popleft()
                self._bytes -= size
            try:
                self._cache.keep(task, result)
            except Exception:  # noqa: BLE001 - the thread's loop: only this result is lost
                _log.exception("cache.not_kept", extractor=task.extractor)


class _Extractors(Handler):
    """The models of one placement on one device."""

    def __init__(self, context: Context, arena: Arena) -> None:
        self._context = context
        self._arena = arena
        self._writer: CacheWriter | None = None

    def load(self) -> Mapping[str, str]:
        launch, settings = self._context.launch, self._context.settings
        self._suite = ExtractorSuite(
            settings.features, launch.device, launch.extractors, threads=launch.threads
        )
        self._suite.load()
        if settings.cache.url is not None:
            cache = FeatureCache(GuardedStore.open(settings.cache), settings)
            cache.expect(self._suite.by_extractor)
            self._writer = CacheWriter(cache)
        return {"fingerprints": packed(self._suite.by_extractor)}

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        extracts = [task for task in tasks if isinstance(task, ExtractTask)]
        outcomes = run_extract(self._suite, extracts, self._arena)
        if self._writer is not None:
            for task, outcome in zip(extracts, outcomes, strict=True):
                if isinstance(outcome, Extracted):
                    self._writer.keep(task, outcome)
        return outcomes

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _BundleFolder:
    """A bundle with its rules that is looked at again and again, and the last good one.

    What cannot be used is refused once it is the same at two looks: until then it may be a bundle
    that is being copied.

    Attributes:
        inferer: The last good one, loaded; None before the first.
        refused: The reason why what is in the folder now is not used; empty where it is.
    """

    def __init__(self, settings: FusionSettings, name: str, device: str) -> None:
        self.inferer: Inferer | None = None
        self.refused = ""
        self._name = name
        self._settings = settings
        self._device = device
        self._used: _Signature | None = None
        self._doubted: _Signature | None = None
        self._unusable: _Signature | None = None

    @property
    def version(self) -> tuple[str, str] | None:
        return (self.inferer.name, self.inferer.version) if self.inferer is not None else None

    def look(self, expected: Mapping[Stream, str] | None) -> bool:
        """Load what is in the folder if it is new; return True where that is used from now on.

        ``expected`` are the fingerprints that it must be made for, where they are known.
        """
        signature = _signature(self._settings)
        if signature == self._used:
            self.refused = ""  # it is back again
            return False
        if signature == self._unusable:
            return False
        try:
            self.load(expected)
        except Exception as other:  # noqa: BLE001 - whatever is in it, the one before is used
            folder = self._settings.bundle
            error = (
                other
                if isinstance(other, TaggingError)
                else BundleError(f"{folder}: {type(other).__name__}: {one_line(other, 300)}")
            )
            doubted, self._doubted = self._doubted, signature
            if signature == doubted:
                self._refuse(error, signature)
            return False
        new = self.inferer
        if new is not None:
            about = {"name": new.name, "version": new.version, "rules": new.rules}
            _log.info("workers.bundle_swapped", bundle=self._name, **about)
        return True

    def load(self, expected: Mapping[Stream, str] | None) -> None:
        """Load what is in the folder; TaggingError where it cannot be used."""
        signature = _signature(self._settings)
        new = _opened(self._settings, self._device, expected)
        if _signature(self._settings) != signature:
            new.close()  # perhaps the name of one bundle and the weights of another
            raise RetryableError(f"{self._settings.bundle}: has changed while it was read")
        self.close()
        self.inferer, self._used = new, signature

    def load_instead(
        self, folder: Path, expected: Mapping[Stream, str] | None, error: TaggingError
    ) -> None:
        """Load a copy that `keep` has made, since what is in the folder is refused."""
        copied = {"bundle": folder}
        if self._settings.tags is not None:
            copied["tags"] = folder / _KEPT_TAGS
        self.inferer = _opened(self._settings.model_copy(update=copied), self._device, expected)
        self._refuse(error, _signature(self._settings))

    def keep(self, folder: Path) -> None:
        """Copy the bundle that is used, unless that has been done, or it is the copy."""
        if self._used is None:
            return
        bundle, tags = self._settings.bundle, self._settings.tags
        copies = {bundle / _BUNDLE_FILES[0]: folder / _BUNDLE_FILES[0]}
        if tags is not None:
            copies[tags] = folder / _KEPT_TAGS
        try:
            with suppress(FileNotFoundError):
                if all(copy.read_bytes() == file.read_bytes() for file, copy in copies.items()):
                    return
            with new_folder(folder) as part:
                shutil.copytree(bundle, part, dirs_exist_ok=True, ignore_dangling_symlinks=True)
                if tags is not None:
                    shutil.copyfile(tags, part / _KEPT_TAGS)
                if _signature(self._settings) != self._used:
                    raise OSError("it has changed meanwhile")
        except (OSError, shutil.Error) as error:  # it is used all the same
            _log.warning("workers.bundle_not_kept", reason=one_line(error))

    def close(self) -> None:
        """Free the bundle."""
        if self.inferer is not None:
            self.inferer.close()
        self.inferer, self.refused = None, ""
        self._used = self._unusable = None

    def _refuse(self, error: TaggingError, signature: _Signature) -> None:
        if not isinstance(error, RetryableError):
            self._unusable = signature  # not read again
        reason = one_line(error)
        if reason != self.refused:
            self.refused = reason
            _log.error(
                "workers.bundle_refused", bundle=self._name, reason=reason, serving=self.version
            )


class _Fusion(Handler):
    """The bundle that is served, one on trial, and the swaps to newer ones between two batches.

    Each comes with the rules of serving. A copy of the last good ones lies next to the bundle, and
    is served where the bundle itself is broken, perhaps because it is being copied just now.
    """

    def __init__(self, settings: FusionSettings, launch: Launch) -> None:
        self._settings = settings
        expected = launch.expected
        self._expected: Mapping[Stream, str] | None = unpacked(expected) if expected else None
        self._last_good = settings.bundle.with_name(f".{settings.bundle.name}.good")
        self._served = _BundleFolder(settings, "served", launch.device)
        self._shadow: _BundleFolder | None = None
        self._shadow_folder = shadow_folder(settings)
        if launch.shadow:
            trial = settings.model_copy(update={"bundle": self._shadow_folder})
            # On the CPU: what goes wrong on a device is lost for every model on it.
            self._shadow = _BundleFolder(trial, "shadow", "cpu")
        self._shadow_rests_until = 0.0
        self._shadow_failures = 0

    def load(self) -> Mapping[str, str]:
        try:
            self._served.load(self._expected)
        except (BundleError, RetryableError, ConfigError) as error:
            # A person who starts the daemon reads of a mistake; later it must go on without one.
            starting = isinstance(error, ConfigError) and self._expected is None
            if starting or not self._last_good.is_dir():
                raise
            self._served.load_instead(self._last_good, self._expected, error)
        inferer = self._inferer
        self._told = BundleLoaded(inferer.name, inferer.version)
        self._look_at = time.monotonic() + self._settings.reload_s
        return {
            "name": inferer.name,
            "version": inferer.version,
            "fingerprints": packed(inferer.fingerprints),
        }

    @property
    def _inferer(self) -> Inferer:
        if self._served.inferer is None:
            raise RuntimeError("no bundle is loaded")
        return self._served.inferer

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        fuse = [task for task in tasks if isinstance(task, FuseTask)]
        outcomes = run_fuse(self._inferer, fuse)
        shadow = self._shadow.inferer if self._shadow is not None else None
        if shadow is None or time.monotonic() < self._shadow_rests_until:
            return outcomes
        return self._with_shadow(shadow, fuse, outcomes)

    def _with_shadow(
        self, shadow: Inferer, tasks: Sequence[FuseTask], outcomes: Sequence[Outcome]
    ) -> list[Outcome]:
        """Add the tags of the bundle on trial; whatever it does, the real ones stay."""
        began = time.monotonic()
        tagged = [isinstance(outcome, Tags) for outcome in outcomes]
        try:
            tried = iter(
                shadow.predict(
                    [task.features for task, good in zip(tasks, tagged, strict=True) if good]
                )
            )
        except Exception as error:  # noqa: BLE001 - a bundle on trial costs only its own tags
            self._shadow_failures += 1
            if self._shadow_failures & (self._shadow_failures - 1) == 0:  # 1, 2, 4, 8 and so on
                reason = one_line(error, 300)
                _log.error("workers.shadow_failed", batches=self._shadow_failures, reason=reason)
            return list(outcomes)
        seconds = time.monotonic() - began
        if seconds > _QUICK_SHADOW_S:
            self._shadow_rests_until = began + 2 * seconds
        return [
            replace(outcome, shadow=replace(next(tried), scores=_NO_SCORES))
            if isinstance(outcome, Tags)
            else outcome
            for outcome in outcomes
        ]

    def between_batches(self, channel: Channel[Command]) -> float | None:
        # Before the King's fingerprints are known, a bundle for other features would be taken.
        if self._expected is not None and time.monotonic() >= self._look_at:
            if self._served.look(self._expected):
                self._served.keep(self._last_good)
            if self._shadow is not None:
                if self._shadow_folder.is_dir():
                    self._shadow.look(self._expected)
                else:
                    self._shadow.close()
            self._tell(channel)
            self._look_at = time.monotonic() + self._settings.reload_s
        return max(0.0, self._look_at - time.monotonic())

    def _tell(self, channel: Channel[Command]) -> None:
        """Tell the King of the bundles, where any of it has changed."""
        name, version = self._inferer.name, self._inferer.version
        told = BundleLoaded(name, version, self._served.refused)
        if self._shadow is not None:
            shadow, refused = self._shadow.version, self._shadow.refused
            told = msgspec.structs.replace(told, shadow=shadow, shadow_refused=refused)
        if told != self._told:
            self._told = told
            channel.send_wait(told)

    def control(self, message: Command) -> None:
        if isinstance(message, Expect):
            self._expected = unpacked(message.fingerprints)
            if mismatch(self._inferer.fingerprints, self._expected) is None:
                self._served.keep(self._last_good)


def _opened(
    settings: FusionSettings, device: str, expected: Mapping[Stream, str] | None
) -> Inferer:
    """Load a bundle with its rules; raises as `open_bundle`, or where it is for other features."""
    inferer = open_bundle(settings, device)
    wrong = expected and mismatch(inferer.fingerprints, expected)
    if wrong:
        inferer.close()
        raise BundleError(f"bundle {inferer.name} {inferer.version}: {wrong}")
    return inferer


def open_bundle(settings: FusionSettings, device: str) -> Inferer:
    """Load the bundle of the settings with its rules.

    Raises:
        BundleError: It is broken, or of the other switch.
        ConfigError: The rules cannot be read, or do not fit its tags.
    """
    from fusion.infer.inferer import Inferer

    inferer = Inferer.load(
        settings.bundle,
        device=device,
        threads=settings.threads,
        batch_size=settings.batch_size,
        rules=TagRules.read(settings),
    )
    if inferer.image_as_frames != settings.image_as_frames:
        inferer.close()
        raise BundleError(
            f"fusion.image_as_frames is {settings.image_as_frames}, but bundle "
            f"{settings.bundle} was trained with {inferer.image_as_frames}"
        )
    return inferer


def _signature(settings: FusionSettings) -> _Signature:
    """Return what changes whenever the files of bundle and rules do, or the link to them.

    None for a file that is missing; first those of the bundle.
    """
    paths = [settings.bundle / name for name in _BUNDLE_FILES]
    if settings.tags is not None:
        paths.append(settings.tags)
    files: _Signature = []
    for path in paths:
        try:
            stat = path.stat()
            files.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            files.append(None)
    return files


def decode(context: Context) -> None:
    serve(context, _Decoder(context.settings, _slots(context)))


def extract(context: Context) -> None:
    serve(context, _Extractors(context, _slots(context)))


def fuse(context: Context) -> None:
    serve(context, _Fusion(context.settings.fusion, context.launch))


def _slots(context: Context) -> Arena:
    if context.arena is None:
        raise ConfigError(f"{context.launch.role}: the King passed no slots")
    return context.arena
