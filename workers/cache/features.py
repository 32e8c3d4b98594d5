"""The entries that are looked up and written for a post, and their keys.

source URL -> sha256 -> parts that decoding gave -> features of each stream, text that was read
text -> features
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from common.errors import MediaError
from common.files import file_digest
from common.post import (
    MEDIA_KINDS,
    STREAMS,
    Failure,
    FeatureArray,
    MediaKind,
    Modality,
    Stream,
    modality_of,
)
from config.settings import Settings
from extractors.parts import PARTS, FrameChoice, PartKind, slot_bytes
from workers.cache.entries import Entry, GuardedStore
from workers.post_run import embedded_texts, read_text
from workers.protocol import (
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    CacheUpdate,
    Extracted,
    ExtractTask,
    Result,
    Task,
)

FORMAT = 1
"""Raise it when the meaning of entries changes: older ones are then never found."""

_DECODERS = ("av", "opencv-python", "opencv-python-headless", "simplejpeg")


class Keys:
    """Keys of entries under some settings; 64 hex digits each.

    An extractor's fingerprint holds architecture, weights, preprocessing and the sampling that its
    own section of the settings names. What else changes a result stands here: limits that cut a
    file short, and settings of one section that another extractor's input depends on.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # As floats: a default may be an integer here, and none once it has crossed to a worker.
        self._video_limits = {"max_duration_s": float(settings.decode.max_duration_s)}
        max_audio_s = float(settings.decode.max_audio_s)
        self._sound_limits = {**self._video_limits, "max_audio_s": max_audio_s}
        # A post has a dozen keys, of which only contents and fingerprints differ.
        self._private = _text_of(settings.fetch.allow_private_hosts)
        self._precision = _text_of(settings.features.text.precision)
        self._parts = {kind: _text_of(self._parts_of(kind)) for kind in MEDIA_KINDS}
        self._inputs = {
            (kind, stream): _text_of(self._input_of(kind, stream))
            for kind in MEDIA_KINDS
            for stream in STREAMS
        }

    def source(self, url: str) -> str:
        """Return the key of the content that a URL leads to, apart for daemons with other hosts."""
        return _key("source", url, self._private)

    def media(self, sha256: str, kind: MediaKind) -> str:
        """Return the key of the outcome of decoding a file."""
        return _key("parts", sha256, kind, self._parts[kind])

    def stream(self, sha256: str, kind: MediaKind, stream: Stream, fingerprint: str) -> str:
        """Return the key of a media file's features; for ``ocr``, of the text read in it."""
        how = self._inputs[kind, stream]
        return _key("features", sha256, kind, stream, fingerprint, how)

    def text(self, text: str, fingerprint: str) -> str:
        """Return the key of a text's features, whether written or read."""
        return _key("text", text, fingerprint, self._precision)

    @cached_property
    def limits(self) -> str:
        """Return a digest of what, apart from its content, makes a file fail.

        Inside the entry and not in its key: only files that failed are decoded again when a limit
        or a decoder's version changes.
        """
        decode = self._settings.decode
        return _key(
            _text_of(
                decode.max_pixels,
                decode.memory_mb,
                slot_bytes(self._settings),
                {name: _version(name) for name in _DECODERS},
            )
        )

    def _parts_of(self, kind: MediaKind) -> Mapping[str, Any]:
        """Return the settings that decide which parts a file gives."""
        features = self._settings.features
        heard = {"speech_s": features.asr.max_s} if features.asr.enabled else {}
        if kind == "audio":
            return {**self._sound_limits, **heard}
        if kind == "image":
            padded = {"padded": True} if features.image.padded else {}
            frames = {"max_frames": features.image.max_frames}
            return {"ocr": features.ocr.enabled, **frames, **padded}
        return {
            **self._sound_limits,
            **heard,
            "ocr": features.ocr.enabled and features.ocr.frames > 0,
            **FrameChoice.of(features.video).sampling,
        }

    def _input_of(self, kind: MediaKind, stream: Stream) -> Mapping[str, Any]:
        """Return the settings that decide an extractor's input, apart from its fingerprint."""
        features = self._settings.features
        if stream == "image":
            return {"precision": features.image.precision}
        if stream == "audio":
            return {**self._sound_limits, "precision": features.audio.precision}
        if stream == "asr":
            precisions = [features.asr.precision, features.text.precision]
            return {**self._sound_limits, "precision": precisions}
        if stream == "ocr" and kind == "image":
            return {"max_frames": features.image.max_frames}
        if stream == "ocr":
            return {**self._video_limits, **FrameChoice.of(features.video).sampling}
        return {**self._video_limits, "precision": features.video.precision}


def _key(*parts: str) -> str:
    """Digest texts, each with its length, so that no two lists of them are the same bytes."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        total.update(b"%d:" % len(content))
        total.update(content)
    return total.hexdigest()


def _text_of(*values: Any) -> str:
    """Return settings as text; the same for the same values."""
    return json.dumps([FORMAT, *values], sort_keys=True, ensure_ascii=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class FeatureCache:
    """Features by content. Nothing here raises but `MemoryError`; safe between threads."""

    def __init__(self, store: GuardedStore, settings: Settings) -> None:
        self.store = store
        self._keys = Keys(settings)
        self._sources_ttl_s = settings.cache.sources_ttl_s
        self._fingerprints: Mapping[Stream, str] = {}

    def expect(self, fingerprints: Mapping[Stream, str]) -> None:
        """Look up and write what these extractors give, by name; ``video_lstm`` is one of them."""
        self._fingerprints = dict(fingerprints)

    def lookup(self, task: CacheLookup) -> CacheHits:
        """Return the known features of a post."""
        shas = self._contents(task.media)
        known = [query for query in task.media if query.index in shas]
        keys = {query.index: self._keys_of(query, shas[query.index]) for query in known}
        early = self._text_keys(task, None)
        entries = self.store.get_many(
            [*{k for each in keys.values() for k in each.values()}, *early]
        )
        hits = [self._hit(query, shas[query.index], keys[query.index], entries) for query in known]
        # Pictures that were not read yet may change the texts: then only the certain ones count.
        read = {m.index: m.text for m in hits if m.text is not None}
        seen = {m.index for m in hits if "picture" in m.ready}
        texts = early
        if all("picture" not in query.wants or query.index in seen for query in task.media):
            texts = self._text_keys(task, read)
            entries |= self.store.get_many([key for key in texts if key not in entries])
        arrays = {
            text: entries[key].arrays["text"]
            for key, text in texts.items()
            if key in entries and "text" in entries[key].arrays
        }
        return CacheHits(tuple(hits), arrays)

    def _contents(self, media: Iterable[CacheQuery]) -> dict[int, str]:
        shas: dict[int, str] = {}
        sources: dict[int, str] = {}
        for query in media:
            if query.sha256:
                shas[query.index] = query.sha256
            elif query.local:
                with suppress(OSError, ValueError):
                    shas[query.index] = file_digest(Path(query.media.source))
            elif self._sources_ttl_s != 0:
                sources[query.index] = self._keys.source(query.media.source)
        entries = self.store.get_many(list(dict.fromkeys(sources.values())))
        oldest = time.time() - self._sources_ttl_s if self._sources_ttl_s is not None else 0.0
        for index, key in sources.items():
            facts = entries[key].facts if key in entries else None
            if facts and isinstance(facts.get("sha256"), str) and facts.get("at", 0.0) >= oldest:
                shas[index] = facts["sha256"]
        return shas

    def _streams(self, part: PartKind) -> list[Stream]:
        modality = PARTS[part].modality
        return [s for s in STREAMS if modality_of(s) == modality and s in self._fingerprints]

    def _keys_of(self, query: CacheQuery, sha256: str) -> dict[str, str]:
        kind = query.media.kind
        keys = {"media": self._keys.media(sha256, kind)}
        for part in query.wants:
            for stream in self._streams(part):
                fingerprint = self._fingerprints[stream]
                keys[stream] = self._keys.stream(sha256, kind, stream, fingerprint)
        return keys

    def _hit(
        self, query: CacheQuery, sha256: str, keys: Mapping[str, str], known: Mapping[str, Entry]
    ) -> CacheHit:
        decoded = _Decoding.of(known.get(keys["media"]), self._keys.limits)
        ready: set[PartKind] = set()
        arrays: dict[Stream, FeatureArray] = {}
        text: str | None = None
        for part in query.wants:
            if decoded is not None and part not in decoded.parts:
                ready.add(part)  # the file has none
                continue
            streams = self._streams(part)
            entries = {s: known[keys[s]] for s in streams if keys[s] in known}
            if not streams or len(entries) < len(streams):
                continue
            if part == "picture":
                if entries["ocr"].text is None:
                    continue
                text = entries["ocr"].text
            elif all(s in entry.arrays for s, entry in entries.items()):
                arrays.update({s: entry.arrays[s] for s, entry in entries.items()})
            else:
                continue
            ready.add(part)
        return CacheHit(
            index=query.index,
            sha256=sha256,
            whole=decoded is not None and len(ready) == len(query.wants),
            ready=frozenset(ready),
            arrays=arrays,
            text=text,
            failure=decoded.failure if decoded else None,
            failures=decoded.failures if decoded else {},
        )

    def _text_keys(self, task: CacheLookup, read: Mapping[int, str] | None) -> dict[str, str]:
        """Return key -> text to embed; without ``read`` only the texts that are certain already."""
        fingerprint = self._fingerprints.get("text")
        if fingerprint is None or not task.texts:
            return {}
        certain = task.ocr is not None or not any("picture" in query.wants for query in task.media)
        if read is None and not certain and task.mode == "append":
            return {}
        texts = embedded_texts(task.text, read_text(task.ocr, read or {}), task.mode)
        return {self._keys.text(t, fingerprint): t for m, t in texts.items() if m in task.texts}

    def entries_of(self, task: ExtractTask, result: Extracted) -> dict[str, Entry]:
        """Return key -> entry of an extractor's result."""
        if task.extractor == "text":
            fingerprint = self._fingerprints.get("text")
            if fingerprint is None or result.array is None:
                return {}
            return {self._keys.text(task.text, fingerprint): Entry({"text": result.array})}
        if not task.sha256 or task.kind is None:
            return {}
        entries: dict[Stream, Entry] = {}
        if task.extractor == "ocr":
            entries["ocr"] = Entry(text=result.text)
        elif result.array is not None:
            entries[task.extractor] = Entry({task.extractor: result.array})
            entries.update({s: Entry({s: array}) for s, array in result.also.items()})
        return {
            self._keys.stream(task.sha256, task.kind, s, self._fingerprints[s]): entry
            for s, entry in entries.items()
            if s in self._fingerprints
        }

    def update(self, update: CacheUpdate) -> None:
        """Write the content that a URL led to, or the outcome of decoding a file."""
        if update.source:
            if self._sources_ttl_s != 0:
                facts: dict[str, Any] = {"sha256": update.sha256, "at": time.time()}
                self.store.put(self._keys.source(update.source), Entry(facts=facts))
            return
        reasons = [*update.failures.values(), *([update.failure] if update.failure else [])]
        if any(f.retryable or f.type != MediaError.__name__ for f in reasons):
            return  # it may turn out otherwise another time
        limits = self._keys.limits if reasons else None
        decoding = _Decoding(frozenset(update.parts), update.failure, update.failures, limits)
        facts = msgspec.to_builtins(decoding)
        self.store.put(self._keys.media(update.sha256, update.kind), Entry(facts=facts))

    def keep(self, task: ExtractTask, result: Extracted) -> None:
        for key, entry in self.entries_of(task, result).items():
            self.store.put(key, entry)

    def learn(self, task: Task, outcome: Result | Failure) -> None:
        """Write the outcome of a task, if it is worth it."""
        update = CacheUpdate.of(task, outcome)
        if update is not None:
            self.update(update)
        elif isinstance(task, ExtractTask) and isinstance(outcome, Extracted):
            self.keep(task, outcome)


class _Decoding(msgspec.Struct, frozen=True):
    """The outcome of decoding a file, as it is stored.

    Attributes:
        limits: The limits under which something failed; None: nothing did.
    """

    parts: frozenset[PartKind]
    failure: Failure | None
    failures: Mapping[Modality, Failure]
    limits: str | None

    @classmethod
    def of(cls, entry: Entry | None, limits: str) -> _Decoding | None:
        """Return it from an entry; None if there is none, or it failed under other limits."""
        if entry is None:
            return None
        try:
            decoding = msgspec.convert(entry.facts, cls)
        except msgspec.ValidationError:
            return None
        return decoding if decoding.limits in (None, limits) else None
