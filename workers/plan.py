"""The plan of one post: which tasks follow from which results.

Pure: it starts nothing and knows no process. The King executes its steps on the pool, and
`workers.local` executes the same steps in this process, so that a post gets the same features
and tags online and offline.

    media ─ fetch ─► decode ─┬─► extract video │ image │ audio ──────────┐
                             └─► read (ocr) ─► [joined over the media]   ├─► Features ─► fuse
    text ───────────────────────► extract text, extract ocr ─────────────┘

Extraction runs per media file and not per modality: a post never holds one slot while it waits
for another, so posts cannot deadlock on slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from config.errors import NothingUsable, RetryableError, WorkerDied
from config.settings import FeatureSettings
from workers.protocol import (
    MODALITIES,
    ArrayRef,
    Decoded,
    DecodeTask,
    Extracted,
    ExtractTask,
    Failure,
    Features,
    Fetched,
    FetchTask,
    Media,
    Modality,
    Post,
    Result,
    Status,
    Task,
)

_TEXT = -1  # media index of steps that belong to no media file

NO_SLOT = -1
"""Slot of a `DecodeTask` before its executor has assigned one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One task of the plan and the media file it belongs to."""

    task: Task
    media_index: int

    @property
    def stage(self) -> str:
        """``fetch``, ``decode`` or ``extract``."""
        if isinstance(self.task, FetchTask):
            return "fetch"
        return "decode" if isinstance(self.task, DecodeTask) else "extract"


class PostPlan:
    """State of one post between its arrival and its features."""

    def __init__(self, post: Post, settings: FeatureSettings, *, max_media: int) -> None:
        self.post = post
        self._settings = settings
        self._media: tuple[Media, ...] = post.media[:max_media]
        self.media_left_out = len(post.media) - len(self._media)
        self._open: set[Step] = set()
        self._media_open = len(self._media)
        self._tasks_of_media: dict[int, int] = {}
        self._arrays: dict[tuple[Modality, int], np.ndarray] = {}
        self._read: dict[int, str] = {}
        self._failures: dict[Modality, list[Failure]] = {}
        self._text_issued = False

    @property
    def finished(self) -> bool:
        """Whether every step has ended."""
        return not self._open and self._text_issued

    def start(self) -> list[Step]:
        """The steps that can run at once."""
        steps = [Step(FetchTask(media), i) for i, media in enumerate(self._media)]
        self._tasks_of_media = dict.fromkeys(range(len(self._media)), 1)
        if not self._media:
            steps += self._text_steps()
        elif self._settings.ocr_mode == "separate":
            steps += self._embed("text", self.post.text)
        self._open.update(steps)
        return steps

    def done(self, step: Step, result: Result) -> list[Step]:
        """Take a step's result and give the steps that follow from it."""
        self._open.discard(step)
        follow: list[Step] = []
        if isinstance(result, Fetched):
            media = self._media[step.media_index]
            follow = [Step(DecodeTask(media.kind, result.path, NO_SLOT), step.media_index)]
        elif isinstance(result, Decoded):
            for modality, failure in result.failures.items():
                self._failures.setdefault(modality, []).append(failure)
            follow = self._extract(step.media_index, result)
        elif isinstance(result, Extracted) and isinstance(step.task, ExtractTask):
            self._keep(step, step.task, result)
        return self._advance(step, follow)

    def failed(self, step: Step, failure: Failure) -> list[Step]:
        """Take a step's failure: its modality is broken, the rest goes on."""
        self._open.discard(step)
        self._failures.setdefault(self._blame(step), []).append(failure)
        return self._advance(step, [])

    def features(self) -> Features:
        """The post's features, once `finished`.

        Raises:
            RetryableError: Nothing is usable, but a later attempt may do better.
            NothingUsable: Nothing is usable.
        """
        arrays: dict[Modality, np.ndarray] = {}
        statuses: dict[Modality, Status] = {}
        for modality in MODALITIES:
            keys = sorted(key for key in self._arrays if key[0] == modality)
            if keys:
                arrays[modality] = np.concatenate([self._arrays[key] for key in keys])
            statuses[modality] = self._status(modality, bool(keys))
        if not arrays:
            raise self._nothing_usable()
        return Features(
            post_id=self.post.post_id,
            arrays=arrays,
            statuses=statuses,
            failures={m: failures[0] for m, failures in self._failures.items()},
            ocr_text=self._ocr_text(),
        )

    # Parts -----------------------------------------------------------------------------------

    def _extract(self, index: int, decoded: Decoded) -> list[Step]:
        refs: dict[str, list[ArrayRef]] = {}
        for part in decoded.parts:
            refs.setdefault(part.kind, []).append(part.ref)
        wanted: tuple[tuple[str, ExtractTask], ...] = (
            ("frames", ExtractTask("video", "video")),
            ("image", ExtractTask("image", "image")),
            ("patches", ExtractTask("audio", "audio")),
            ("picture", ExtractTask("ocr", "ocr")),
        )
        return [
            Step(ExtractTask(task.extractor, task.modality, tuple(refs[kind])), index)
            for kind, task in wanted
            if kind in refs and not (kind == "picture" and self.post.ocr is not None)
        ]

    def _keep(self, step: Step, task: ExtractTask, result: Extracted) -> None:
        if result.array is not None and len(result.array):
            self._arrays[(task.modality, step.media_index)] = result.array
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
        read = self._ocr_text() or ""
        if self._settings.ocr_mode == "append":
            both = "\n".join(text for text in (self.post.text.strip(), read) if text)
            return self._embed("text", both)
        steps = [] if self._media else self._embed("text", self.post.text)
        return steps + self._embed("ocr", read)

    def _embed(self, modality: Modality, text: str) -> list[Step]:
        if not text.strip():
            return []
        return [Step(ExtractTask("text", modality, text=text), _TEXT)]

    def _ocr_text(self) -> str | None:
        if self.post.ocr is not None:
            return self.post.ocr
        lines = [self._read[i].strip() for i in sorted(self._read)]
        text = "\n".join(line for line in lines if line)
        return text or None

    def _blame(self, step: Step) -> Modality:
        if isinstance(step.task, ExtractTask):
            return step.task.modality
        return self._media[step.media_index].kind

    def _status(self, modality: Modality, present: bool) -> Status:
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
        if any(f.retryable for f in failures):
            return RetryableError(f"nothing usable yet: {reasons}")
        return NothingUsable(f"nothing usable: {reasons}")


def is_worker_death(failure: Failure) -> bool:
    """Whether a step failed because its worker died, which costs the post an attempt."""
    return failure.type == WorkerDied.__name__
