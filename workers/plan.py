"""The plan of one post: which tasks follow from which results.

Pure: it starts nothing and knows no process. `workers.post_run` runs its steps on a pool, so that
a post gets the same features and tags from the daemon, over HTTP and offline.

    media - fetch -> decode -+-> extract video | image | audio ----------+
                             '-> read (ocr) -> [joined over the media]   +-> Features -> fuse
    text ---------------------> extract text, extract ocr ---------------+

With a feature cache all of this is looked up first, and only the missing parts are computed:

    lookup -+-> [features from the cache] -------------------------------> Features -> fuse
            '-> fetch -> lookup by content -> decode -> extract what is missing

Extraction runs per media file and not per modality: a post never holds one slot while it waits
for another, so posts cannot deadlock on slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import NothingUsable, RetryableError
from common.post import (
    MODALITIES,
    STREAMS,
    Failure,
    FeatureArray,
    Features,
    Media,
    MediaKind,
    Modality,
    Post,
    Status,
    Stream,
    modality_of,
)
from config.settings import FeatureSettings
from extractors.parts import PARTS, PartKind, parts_of
from workers.protocol import (
    NO_SLOT,
    ArrayRef,
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    Decoded,
    DecodeTask,
    Extracted,
    ExtractTask,
    Fetched,
    FetchTask,
    Result,
    Task,
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
            case _:
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
        self._modalities = frozenset(MODALITIES) if modalities is None else modalities
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
            keys = sorted(key for key in self._arrays if key[0] == stream)
            if keys:
                arrays[stream] = np.concatenate([self._arrays[key] for key in keys])
        if not arrays and not self._partial:
            raise self._nothing_usable()
        present = {modality_of(stream) for stream in arrays}
        return Features(
            post_id=self.post.post_id,
            arrays=arrays,
            statuses={m: self._status(m, m in present) for m in MODALITIES},
            failures={m: failures[0] for m, failures in self._failures.items()},
            ocr_text=self._ocr_text(),
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
    texts: dict[Modality, str]
    if mode == "append":
        texts = {"text": "\n".join(part for part in (text.strip(), read or "") if part)}
    else:
        texts = {"text": text, "ocr": read or ""}
    return {modality: each for modality, each in texts.items() if each.strip()}
