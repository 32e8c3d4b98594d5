"""Work, results, and the reading of posts as work: one at a time, memory stays flat.

The values pickle and import nothing heavy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from common.errors import ConfigError
from common.fingerprint import digest
from common.post import Failure, Media, MediaKind, Modality, Post, Status
from common.urls import is_url
from config.settings import Settings
from fusion.data.data_file import (
    BadLine,
    CorpusPost,
    count_lines,
    local_path,
    objects,
    read_posts,
)

Kind: TypeAlias = Literal["image", "video", "audio", "text"]
"""The four scripts."""

MODALITIES_OF: Mapping[Kind, frozenset[Modality]] = {
    "text": frozenset({"text", "ocr"}),
    "audio": frozenset({"audio", "asr"}),
    "image": frozenset({"image"}),
    "video": frozenset({"video"}),
}
"""Modalities of each script; words in pictures belong to the text, and those in sound to it."""

State: TypeAlias = Literal["done", "there", "failed", "rejected", "repeated"]
"""Extracted now; extracted by an earlier run; lost; not a post; a repeated post_id."""


@dataclass(frozen=True, slots=True)
class FailedPart:
    """A line of the failures file; no modality where the whole post failed."""

    post_id: str | None
    modality: Modality | None
    failure: Failure

    def line(self) -> str:
        """Return ``{post_id, modality, stage, type, message}``."""
        content = {"post_id": self.post_id, "modality": self.modality, **self.failure.as_dict()}
        return json.dumps(content, ensure_ascii=False)

    @property
    def reason(self) -> str:
        """Return the class of the failure, for counting."""
        return f"{self.modality or 'post'}: {self.failure.stage} {self.failure.type}"


@dataclass(frozen=True, slots=True)
class Work:
    """One post to extract.

    Attributes:
        index: Its place in the input, from 0; failures are listed in this order.
        post: Its sources are absolute paths or URLs.
        digests: Modality -> digest of what its features are made from.
        lost: Modality -> why media of it were not to be had before this run.
    """

    index: int
    post: Post
    digests: Mapping[Modality, str]
    lost: Mapping[Modality, Failure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one line of the input; `node` is where, empty on this machine."""

    index: int
    post_id: str | None
    state: State
    statuses: Mapping[Modality, Status] = field(default_factory=dict)
    failures: tuple[FailedPart, ...] = ()
    node: str = ""


Entry: TypeAlias = Work | Result
"""A line of the input: work, or the result of a line that needs none."""


_CONTENT_NAME = re.compile(r"[0-9a-f]{64}(\.\w+)?")
POSTS_OF_MANIFEST = "posts.jsonl"
"""File next to a manifest: its posts, with paths instead of URLs."""


@dataclass(frozen=True, slots=True)
class _Source:
    """One media of a post: as written, its location, and its size there."""

    media: Media
    location: str
    size_bytes: int | None

    @property
    def identity(self) -> list[Any]:
        """Return what changes when the media does: content-addressed names may move."""
        name = self.media.source.rpartition("/")[2]
        is_content = _CONTENT_NAME.fullmatch(name) and not is_url(self.media.source)
        return [self.media.kind, name if is_content else self.media.source, self.size_bytes]


class Inputs:
    """The work in a posts file; the manifest of its download tells why media are not there."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        modalities: frozenset[Modality],
        manifest: Path | None = None,
        limit: int | None = None,
    ) -> None:
        self._path, self._manifest, self._limit = path, manifest, limit
        self._settings, self._modalities = settings, modalities

    def count(self) -> int:
        """Count the lines of the input, empty ones included."""
        lines = count_lines(self._path)
        return lines if self._limit is None else min(lines, self._limit)

    def __iter__(self) -> Iterator[Entry]:
        seen: set[int] = set()
        losses = _Losses(self._manifest)
        entries = itertools.islice(read_posts(self._path), self._limit)
        for index, entry in enumerate(entries):
            if isinstance(entry, BadLine):
                failure = Failure("input", "BadLine", f"line {entry.line}: {entry.reason}")
                part = FailedPart(entry.post_id, None, failure)
                yield Result(index, entry.post_id, "rejected", failures=(part,))
                continue
            lost = losses.of(entry.post.post_id)
            key = _short_hash(entry.post.post_id)
            if key in seen:
                yield Result(index, entry.post.post_id, "repeated")
                continue
            seen.add(key)
            yield self._work(index, entry, lost)
        if self._limit is None:
            losses.check_all_taken()

    def _work(self, index: int, entry: CorpusPost, lost: Sequence[_Loss]) -> Work:
        post = entry.post
        lost = [*lost, *(self._outside(media) for media in post.media if _leaves(media.source))]
        sources = [self._source(media) for media in post.media if not _leaves(media.source)]
        counted = sources[: self._settings.fetch.max_media]
        blamed: dict[Modality, Failure] = {}
        for loss in lost:
            modality = self._blame(loss.kind, post)
            if modality is not None:
                blamed.setdefault(modality, loss.failure)
        media = tuple(Media(source.media.kind, source.location) for source in sources)
        located = Post(post.post_id, text=post.text, media=media, ocr=post.ocr)
        return Work(index, located, self._digests(post, counted, lost), blamed)

    def _outside(self, media: Media) -> _Loss:
        why = f"{media.source}: leaves the folder of {self._path.name}; write it as a whole path"
        return _Loss(media.kind, media.source, Failure("fetch", "FetchRefused", why))

    def _source(self, media: Media) -> _Source:
        path = local_path(media.source, self._path)
        if path is None:
            return _Source(media, media.source, None)
        try:
            size_bytes = path.stat().st_size
        except (OSError, ValueError):
            size_bytes = None
        return _Source(media, str(path.absolute()), size_bytes)

    def _blame(self, kind: MediaKind, post: Post) -> Modality | None:
        """Return the modality that a missing media file fails, as `workers.post_run` has it."""
        if kind in self._modalities:
            return kind
        if kind == "video" and "audio" in self._modalities:
            return "audio"
        if "text" not in self._modalities or not self._reads(post, kind):
            return None
        return "text" if self._settings.features.ocr_mode == "append" else "ocr"

    def _reads(self, post: Post, kind: MediaKind) -> bool:
        ocr = self._settings.features.ocr
        shown = kind == "image" or (kind == "video" and ocr.frames > 0)
        return ocr.enabled and post.ocr is None and shown

    def _digests(
        self, post: Post, sources: Sequence[_Source], lost: Sequence[_Loss]
    ) -> dict[Modality, str]:
        """Digest what the features of each modality are made from."""
        decode = self._settings.decode
        limits = [decode.max_pixels, decode.max_duration_s, decode.max_audio_s]

        def media(kinds: Iterable[MediaKind]) -> list[Any]:
            chosen = frozenset(kinds)
            present = [s.identity for s in sources if s.media.kind in chosen]
            gone = [[one.kind, one.source, one.failure.type] for one in lost if one.kind in chosen]
            return [present, gone, limits]

        read = media(kind for kind in ("image", "video") if self._reads(post, kind))
        words = [post.ocr, read]
        appended = self._settings.features.ocr_mode == "append"
        parts: dict[Modality, Any] = {
            "video": media(("video",)),
            "image": media(("image",)),
            "audio": media(("audio", "video")),
            "asr": media(("audio", "video")),
            "text": [post.text, words] if appended else [post.text],
            "ocr": words,
        }
        return {m: digest({"made_from": parts[m]}) for m in parts if m in self._modalities}


@dataclass(frozen=True, slots=True)
class _Loss:
    kind: MediaKind
    source: str
    failure: Failure


class _Losses:
    """Failed media of a manifest, post by post in its order; without one there are none."""

    def __init__(self, path: Path | None) -> None:
        self._lines = iter(()) if path is None else objects(path)
        self._next = next(self._lines, None)

    def of(self, post_id: str) -> list[_Loss]:
        losses: list[_Loss] = []
        while self._next is not None and self._next[1].get("post_id") == post_id:
            where, content = self._next
            if content.get("status") == "failed":
                losses.append(_loss(content, where))
            self._next = next(self._lines, None)
        return losses

    def check_all_taken(self) -> None:
        """Refuse a manifest with lines left."""
        if self._next is not None:
            where, content = self._next
            raise ConfigError(
                f"{where}: post {content.get('post_id')!r} is not at its "
                f"place in {POSTS_OF_MANIFEST}: the two were not made together"
            )


def _loss(content: dict[str, Any], where: str) -> _Loss:
    reason = content.get("reason") or {}
    kind = content.get("kind")
    if kind not in ("image", "video", "audio") or not isinstance(reason, dict):
        raise ConfigError(f"{where}: is not a line of a manifest")
    failure = Failure(
        str(reason.get("stage", "fetch")),
        str(reason.get("type", "FetchRefused")),
        str(reason.get("message", "was not downloaded")),
    )
    return _Loss(kind, str(content.get("source", "")), failure)


def _leaves(source: str) -> bool:
    """Return True when a relative path leaves its file's folder."""
    if is_url(source) or source.startswith("/"):
        return False
    return os.path.normpath(source).split("/")[0] == ".."


def _short_hash(post_id: str) -> int:
    """Return a 64-bit hash of a post's ID: a set of them is a tenth of a set of IDs."""
    raw = hashlib.blake2b(post_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little")
