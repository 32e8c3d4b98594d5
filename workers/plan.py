"""The plan of one post: which tasks follow from which results.

Pure: it starts nothing and knows no process. The King executes its steps on the pool, and
`workers.local` executes the same steps in this process, so that a post gets the same features
and tags online and offline.

    media ─ fetch ─► decode ─┬─► extract video │ image │ audio ──────────┐
                             └─► read (ocr) ─► [joined over the media]   ├─► Features ─► fuse
    text ───────────────────────► extract text, extract ocr ─────────────┘

With a feature cache all of this is looked up first, and only what it does not know is done:

    recall ─┬─► [features that are known] ───────────────────────────────────────► Features ─► fuse
            └─► fetch ─► recall by content ─► decode ─► extract what is missing

Extraction runs per media file and not per modality: a post never holds one slot while it waits
for another, so posts cannot deadlock on slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import NothingUsable, RetryableError, WorkerDied
from config.settings import FeatureSettings
from workers.protocol import (
    MODALITIES,
    STREAMS,
    ArrayRef,
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    Decoded,
    DecodeTask,
    Extracted,
    ExtractTask,
    Failure,
    Features,
    Fetched,
    FetchTask,
    Media,
    MediaKind,
    Modality,
    PartKind,
    Post,
    Result,
    Status,
    Stream,
    Task,
    modality_of,
)

NO_SLOT = -1
"""Slot of a `DecodeTask` before its executor has assigned one."""


_TEXT = -1  # media index of steps that belong to no media file

_GIVES: dict[MediaKind, tuple[Modality, ...]] = {
    "image": ("image",),
    "video": ("video", "audio"),
    "audio": ("audio",),
}
"""What a media file of a kind gives, apart from text to read."""

_PART: dict[str, PartKind] = {"video": "frames", "image": "image", "audio": "patches"}


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the plan and the media file it belongs to."""

    task: Task
    media_index: int

    @property
    def stage(self) -> str:
        """``recall``, ``fetch``, ``decode`` or ``extract``."""
        if isinstance(self.task, CacheLookup):
            return "recall"
        if isinstance(self.task, FetchTask):
            return "fetch"
        return "decode" if isinstance(self.task, DecodeTask) else "extract"

    @property
    def holds(self) -> str | None:
        """The downloaded file that it needs; nobody needs it once no step holds it."""
        if isinstance(self.task, (CacheLookup, DecodeTask)):
            return self.task.path or None
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
            post: What is to be read.
            settings: Of the extractors.
            max_media: Media beyond it are left out.
            modalities: Only what these need is fetched and extracted, the others are ``missing``;
                None is all of them. `features` then gives what there is, be it nothing: the
                caller knows the rest of the post.
            cache: Whether there is a feature cache to ask, and to tell.
            local: Which sources are paths of files that the cache may read to know them again;
                never one that a post of the platform brings along.
        """
        self.post = post
        self._settings = settings
        self._wanted = frozenset(MODALITIES) if modalities is None else modalities
        self._partial = modalities is not None
        listed = post.media[:max_media]
        self.media_left_out = len(post.media) - len(listed)
        self._reads = self._pictures_are_read()
        self._media: tuple[Media, ...] = tuple(m for m in listed if self._gives(m.kind))
        self._open: set[Step] = set()
        self._media_open = len(self._media)
        self._tasks_of_media: dict[int, int] = {}
        self._arrays: dict[tuple[Stream, int], np.ndarray] = {}
        self._read: dict[int, str] = {}
        self._failures: dict[Modality, list[Failure]] = {}
        self._text_issued = False
        self._cache = cache
        self._local = local
        self._recalled: dict[int, CacheHit] = {}
        self._known_texts: dict[str, np.ndarray] = {}
        self._embedded: set[Modality] = set()

    @property
    def finished(self) -> bool:
        """Whether every step has ended."""
        return not self._open and self._text_issued

    def start(self) -> list[Step]:
        """The steps that can run at once."""
        self._tasks_of_media = dict.fromkeys(range(len(self._media)), 1)
        asks = self._cache and bool(self._media or self.post.text.strip() or self.post.ocr)
        steps = [self._recall_post()] if asks else self._begin()
        self._open.update(steps)
        return steps

    def done(self, step: Step, result: Result) -> list[Step]:
        """Take a step's result and give the steps that follow from it."""
        self._open.discard(step)
        follow: list[Step] = []
        if isinstance(step.task, CacheLookup):
            return self._after_recall(step, step.task, result)
        if isinstance(result, Fetched):
            follow = [self._after_fetch(step, result)]
        elif isinstance(result, Decoded):
            self._sides_failed(result.failures)
            if isinstance(step.task, DecodeTask):
                follow = self._extract(step.media_index, result, step.task.sha256)
        elif isinstance(result, Extracted) and isinstance(step.task, ExtractTask):
            self._keep(step, step.task, result)
        return self._advance(step, follow)

    def failed(self, step: Step, failure: Failure) -> list[Step]:
        """Take a step's failure: its modality is broken, the rest goes on."""
        self._open.discard(step)
        if isinstance(step.task, CacheLookup):
            return self._after_recall(step, step.task, CacheHits())
        if isinstance(step.task, FetchTask):
            self._take_ready(step.media_index)  # it is gone, and what it gave is known still
        self._failures.setdefault(self._blame(step), []).append(failure)
        return self._advance(step, [])

    def features(self) -> Features:
        """The post's features, once `finished`.

        Raises:
            RetryableError: Nothing is usable, but a later attempt may do better; never with
                ``modalities``.
            NothingUsable: Nothing is usable; never with ``modalities``.
        """
        arrays: dict[Stream, np.ndarray] = {}
        for stream in STREAMS:
            keys = sorted(key for key in self._arrays if key[0] == stream)
            if keys:
                arrays[stream] = np.concatenate([self._arrays[key] for key in keys])
        if not arrays and not self._partial:
            raise self._nothing_usable()
        there = {modality_of(stream) for stream in arrays}
        statuses = {m: self._status(m, m in there) for m in MODALITIES}
        return Features(
            post_id=self.post.post_id,
            arrays=arrays,
            statuses=statuses,
            failures={m: failures[0] for m, failures in self._failures.items()},
            ocr_text=self._ocr_text(),
        )

    # Cache -----------------------------------------------------------------------------------

    def _begin(self) -> list[Step]:
        """The steps of what is not known."""
        steps = [Step(FetchTask(m), i) for i, m in enumerate(self._media) if not self._whole(i)]
        self._media_open = len(steps)
        if not steps:
            return self._text_steps()
        if self._settings.ocr_mode == "separate":
            steps += self._embed("text", self.post.text)
        return steps

    def _recall_post(self) -> Step:
        texts = frozenset[Modality](("text", "ocr")) & self._wanted
        media = tuple(
            CacheQuery(i, m, self._parts(m.kind), local=self._local(m.source))
            for i, m in enumerate(self._media)
        )
        mode = self._settings.ocr_mode
        return Step(CacheLookup(media, texts, self.post.text, self.post.ocr, mode), _TEXT)

    def _after_fetch(self, step: Step, fetched: Fetched) -> Step:
        """Decode it; first ask for content that nobody has asked for yet."""
        index = step.media_index
        media, known = self._media[index], self._recalled.get(index)
        sha256 = fetched.sha256 if self._cache else ""
        if known is not None and self._local(media.source):
            sha256 = known.sha256
        if known is not None and known.sha256 != sha256:
            known = None
            del self._recalled[index]  # the URL leads to another file now
        if sha256 and known is None:
            asked = CacheQuery(index, media, self._parts(media.kind), sha256)
            return Step(CacheLookup((asked,), path=fetched.path), index)
        return Step(DecodeTask(media.kind, fetched.path, NO_SLOT, sha256), index)

    def _after_recall(self, step: Step, task: CacheLookup, result: Result) -> list[Step]:
        if isinstance(result, CacheHits):
            self._recalled.update({known.index: known for known in result.media})
            self._known_texts.update(result.texts)
        for asked in task.media:
            if self._whole(asked.index):
                self._take_whole(asked.index)
        if step.media_index == _TEXT:
            follow = self._begin()
            self._open.update(follow)
            return follow
        [asked] = task.media
        if self._whole(asked.index):
            return self._advance(step, [])
        decode = DecodeTask(asked.media.kind, task.path, NO_SLOT, asked.sha256)
        return self._advance(step, [Step(decode, asked.index)])

    def _whole(self, index: int) -> bool:
        known = self._recalled.get(index)
        return known is not None and known.whole

    def _take_whole(self, index: int) -> None:
        """What is known of a file stands for all that it would give."""
        known = self._recalled[index]
        self._take_ready(index)
        if known.failure is not None:
            blamed = self._blame_media(self._media[index].kind)
            self._failures.setdefault(blamed, []).append(known.failure)
        self._sides_failed(known.failures)

    def _take_ready(self, index: int) -> frozenset[PartKind]:
        """Take what is known of a file; gives what need not be extracted."""
        known = self._recalled.get(index)
        if known is None:
            return frozenset()
        for stream, array in known.arrays.items():
            if len(array):
                self._arrays[(stream, index)] = array
        if known.text is not None:
            self._read[index] = known.text
        return known.ready

    # Parts -----------------------------------------------------------------------------------

    def _parts(self, kind: MediaKind) -> tuple[PartKind, ...]:
        """What would be extracted of a file of a kind."""
        parts = [_PART[m] for m in _GIVES[kind] if m in self._wanted]
        return (*parts, *(("picture",) if self._reads and kind != "audio" else ()))

    def _sides_failed(self, failures: Mapping[Modality, Failure]) -> None:
        for modality, failure in failures.items():
            if modality in self._wanted:
                self._failures.setdefault(modality, []).append(failure)

    def _extract(self, index: int, decoded: Decoded, sha256: str) -> list[Step]:
        refs: dict[str, list[ArrayRef]] = {}
        for part in decoded.parts:
            refs.setdefault(part.kind, []).append(part.ref)
        wanted: tuple[tuple[str, ExtractTask], ...] = (
            ("frames", ExtractTask("video", "video")),
            ("image", ExtractTask("image", "image")),
            ("patches", ExtractTask("audio", "audio")),
            ("picture", ExtractTask("ocr", "ocr")),
        )
        ready = self._take_ready(index)
        source = sha256, self._media[index].kind
        return [
            Step(ExtractTask(t.extractor, t.modality, tuple(refs[kind]), "", *source), index)
            for kind, t in wanted
            if kind in refs
            and (self._reads if kind == "picture" else t.modality in self._wanted)
            and kind not in ready
        ]

    def _keep(self, step: Step, task: ExtractTask, result: Extracted) -> None:
        if result.array is not None and len(result.array):
            self._arrays[(task.modality, step.media_index)] = result.array
            for stream, array in result.also.items():
                self._arrays[(stream, step.media_index)] = array
        if result.text is not None:
            self._read[step.media_index] = result.text

    def _advance(self, step: Step, follow: list[Step]) -> list[Step]:
        if step.media_index != _TEXT:
            left = self._tasks_of_media[step.media_index] - 1 + len(follow)
            self._tasks_of_media[step.media_index] = left
            if left == 0:
                self._media_open -= 1
                if self._media_open == 0:
                    follow = follow + self._text_steps()
        self._open.update(follow)
        return follow

    def _text_steps(self) -> list[Step]:
        """The embeddings that wait for what was read in the pictures."""
        self._text_issued = True
        texts = embedded_texts(self.post.text, self._ocr_text(), self._settings.ocr_mode)
        return [s for m, t in texts.items() if m not in self._embedded for s in self._embed(m, t)]

    def _embed(self, modality: Modality, text: str) -> list[Step]:
        if not text.strip() or modality not in self._wanted:
            return []
        self._embedded.add(modality)
        known = self._known_texts.get(text)
        if known is None:
            return [Step(ExtractTask("text", modality, text=text), _TEXT)]
        if len(known):
            self._arrays[(modality, _TEXT)] = known
        return []

    def _ocr_text(self) -> str | None:
        return read_text(self.post.ocr, self._read)

    def _blame(self, step: Step) -> Modality:
        if isinstance(step.task, ExtractTask):
            return step.task.modality
        return self._blame_media(self._media[step.media_index].kind)

    def _blame_media(self, kind: MediaKind) -> Modality:
        return kind if kind in self._wanted else self._gives(kind)[0]

    def _pictures_are_read(self) -> bool:
        if not self._settings.ocr.enabled or self.post.ocr is not None:
            return False
        appended = self._settings.ocr_mode == "append" and "text" in self._wanted
        return appended or "ocr" in self._wanted

    def _gives(self, kind: MediaKind) -> tuple[Modality, ...]:
        """What is wanted of a media file of a kind; nothing: it need not be fetched."""
        wanted = tuple(m for m in _GIVES[kind] if m in self._wanted)
        if not self._reads or kind == "audio":
            return wanted
        appended = self._settings.ocr_mode == "append" and "text" in self._wanted
        return (*wanted, "text" if appended else "ocr")

    def _status(self, modality: Modality, present: bool) -> Status:
        if modality not in self._wanted:
            return "missing"
        if modality == "ocr" and self._settings.ocr_mode == "append":
            present = bool(self._ocr_text())  # it has no array: it is inside the text's
        if present:
            return "ok"
        return "failed" if modality in self._failures else "missing"

    def _nothing_usable(self) -> NothingUsable | RetryableError:
        failures = [f for listed in self._failures.values() for f in listed]
        if not failures:
            return NothingUsable("the post has no text and no media")
        reasons = "; ".join(
            f"{modality}: {listed[0].message}" for modality, listed in self._failures.items()
        )
        error: NothingUsable | RetryableError = NothingUsable(f"nothing usable: {reasons}")
        if any(f.retryable for f in failures):
            error = RetryableError(f"nothing usable yet: {reasons}")
        error.reasons = {modality: listed[0].message for modality, listed in self._failures.items()}
        return error


def costs_attempt(step: Step, failure: Failure) -> bool:
    """Whether a step's failure says more about its worker than about its media file."""
    if step.stage == "recall":
        return False  # the post goes on as if nothing were known
    return is_worker_death(failure) or (failure.retryable and step.stage in ("decode", "extract"))


def is_worker_death(failure: Failure) -> bool:
    """Whether a step failed because its worker died, which costs the post an attempt."""
    return failure.type == WorkerDied.__name__


def read_text(ocr: str | None, read: Mapping[int, str]) -> str | None:
    """What the pictures say: as the post brings it along, or as read file by file; None: nothing.

    Args:
        ocr: The post's own, which stands for what would be read.
        read: Index of the media file ─► what was read in it.
    """
    if ocr is not None:
        return ocr
    lines = (read[i].strip() for i in sorted(read))
    return "\n".join(line for line in lines if line) or None


def embedded_texts(
    text: str, read: str | None, mode: Literal["append", "separate"]
) -> dict[Modality, str]:
    """Modality ─► the text that stands for it; a modality without text is left out."""
    if mode == "append":
        both = "\n".join(part for part in (text.strip(), read or "") if part)
        found: dict[Modality, str] = {"text": both}
    else:
        found = {"text": text, "ocr": read or ""}
    return {modality: each for modality, each in found.items() if each.strip()}
