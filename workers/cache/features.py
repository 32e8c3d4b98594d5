"""What is looked up and written for a post.

source URL ─► sha256 ─► what decoding gave ─► features of each stream, text that was read
text ─► features
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.errors import MediaError
from common.files import file_digest
from config.settings import Settings
from extractors.parts import PARTS
from workers.cache.entry import Entry
from workers.cache.keys import Keys
from workers.cache.store import GuardedStore
from workers.plan import embedded_texts, read_text
from workers.protocol import (
    STREAMS,
    CacheHit,
    CacheHits,
    CacheLookup,
    CacheQuery,
    CacheUpdate,
    Extracted,
    ExtractTask,
    Failure,
    FeatureArray,
    PartKind,
    Result,
    Stream,
    Task,
    modality_of,
)


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

    # Reading ----------------------------------------------------------------------------------

    def lookup(self, task: CacheLookup) -> CacheHits:
        """What is known of a post."""
        shas = self._contents(task.media)
        known = [asked for asked in task.media if asked.index in shas]
        keys = {asked.index: self._keys_of(asked, shas[asked.index]) for asked in known}
        early = self._text_keys(task, None)
        found = self.store.get_many([*{k for each in keys.values() for k in each.values()}, *early])
        media = [
            self._recalled(asked, shas[asked.index], keys[asked.index], found) for asked in known
        ]
        # What was not read yet may change the texts: then they are looked up as far as they stand.
        read = {m.index: m.text for m in media if m.text is not None}
        seen = {m.index for m in media if "picture" in m.ready}
        texts = early
        if all("picture" not in a.wants or a.index in seen for a in task.media):
            texts = self._text_keys(task, read)
            found |= self.store.get_many([key for key in texts if key not in found])
        arrays = {
            text: found[key].arrays["text"]
            for key, text in texts.items()
            if key in found and "text" in found[key].arrays
        }
        return CacheHits(tuple(media), arrays)

    def _contents(self, media: Iterable[CacheQuery]) -> dict[int, str]:
        """Index ─► sha256, where it is known or trusted."""
        shas: dict[int, str] = {}
        sources: dict[int, str] = {}
        for asked in media:
            if asked.sha256:
                shas[asked.index] = asked.sha256
            elif asked.local:
                found = _file_digest(Path(asked.media.source))
                if found is not None:
                    shas[asked.index] = found
            elif self._sources_ttl_s != 0:
                sources[asked.index] = self._keys.source(asked.media.source)
        entries = self.store.get_many(list(dict.fromkeys(sources.values())))
        oldest = time.time() - self._sources_ttl_s if self._sources_ttl_s is not None else 0.0
        for index, key in sources.items():
            facts = entries[key].facts if key in entries else None
            if facts and isinstance(facts.get("sha256"), str) and facts.get("at", 0.0) >= oldest:
                shas[index] = facts["sha256"]
        return shas

    def _streams(self, part: PartKind) -> list[Stream]:
        """The streams that a part is turned into, of those that the extractors give."""
        modality = PARTS[part].modality
        return [s for s in STREAMS if modality_of(s) == modality and s in self._fingerprints]

    def _keys_of(self, asked: CacheQuery, sha256: str) -> dict[str, str]:
        """``media`` and each stream ─► key."""
        kind = asked.media.kind
        keys = {"media": self._keys.media(sha256, kind)}
        for part in asked.wants:
            for stream in self._streams(part):
                fingerprint = self._fingerprints[stream]
                keys[stream] = self._keys.stream(sha256, kind, stream, fingerprint)
        return keys

    def _recalled(
        self, asked: CacheQuery, sha256: str, keys: Mapping[str, str], found: Mapping[str, Entry]
    ) -> CacheHit:
        """What is known of one file."""
        decoded = _Decoding.of(found.get(keys["media"]), self._keys.limits)
        ready: set[PartKind] = set()
        arrays: dict[Stream, FeatureArray] = {}
        text: str | None = None
        for part in asked.wants:
            if decoded is not None and part not in decoded.parts:
                ready.add(part)  # the file has none
                continue
            streams = self._streams(part)
            entries = {s: found[keys[s]] for s in streams if keys[s] in found}
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
            index=asked.index,
            sha256=sha256,
            whole=decoded is not None and len(ready) == len(asked.wants),
            ready=frozenset(ready),
            arrays=arrays,
            text=text,
            failure=decoded.failure if decoded else None,
            failures=decoded.failures if decoded else {},
        )

    def _text_keys(self, task: CacheLookup, read: Mapping[int, str] | None) -> dict[str, str]:
        """Key ─► text of what will be embedded; without ``read`` what is certain already."""
        fingerprint = self._fingerprints.get("text")
        if fingerprint is None or not task.texts:
            return {}
        certain = task.ocr is not None or not any("picture" in a.wants for a in task.media)
        if read is None and not certain and task.mode == "append":
            return {}
        texts = embedded_texts(task.text, read_text(task.ocr, read or {}), task.mode)
        return {self._keys.text(t, fingerprint): t for m, t in texts.items() if m in task.texts}

    # Writing ----------------------------------------------------------------------------------

    def entries_of(self, task: ExtractTask, result: Extracted) -> dict[str, Entry]:
        """Key ─► entry of what an extractor gave."""
        if task.extractor == "text":
            fingerprint = self._fingerprints.get("text")
            if fingerprint is None or result.array is None:
                return {}
            return {self._keys.text(task.text, fingerprint): Entry({"text": result.array})}
        if not task.sha256 or task.kind is None:
            return {}
        found: dict[Stream, Entry] = {}
        if task.extractor == "ocr":
            found["ocr"] = Entry(text=result.text)
        elif result.array is not None:
            found[task.extractor] = Entry({task.extractor: result.array})
            found.update({s: Entry({s: array}) for s, array in result.also.items()})
        return {
            self._keys.stream(task.sha256, task.kind, s, self._fingerprints[s]): entry
            for s, entry in found.items()
            if s in self._fingerprints
        }

    def update(self, update: CacheUpdate) -> None:
        """Keep which content a URL led to, or what decoding a file gave."""
        if update.source:
            if self._sources_ttl_s != 0:
                facts: dict[str, Any] = {"sha256": update.sha256, "at": time.time()}
                self.store.put(self._keys.source(update.source), Entry(facts=facts))
            return
        decoded = _Decoding(frozenset(update.parts), update.failure, update.failures)
        found = decoded.facts(self._keys.limits)
        if found is not None:
            self.store.put(self._keys.media(update.sha256, update.kind), Entry(facts=found))

    def keep(self, task: ExtractTask, result: Extracted) -> None:
        """Write what an extractor gave."""
        for key, entry in self.entries_of(task, result).items():
            self.store.put(key, entry)

    def learn(self, task: Task, outcome: Result | Failure) -> None:
        """Write what came of a task, where it is worth it."""
        update = CacheUpdate.of(task, outcome)
        if update is not None:
            self.update(update)
        elif isinstance(task, ExtractTask) and isinstance(outcome, Extracted):
            self.keep(task, outcome)


class _Decoding:
    """What decoding a file gave, as it is kept."""

    def __init__(
        self,
        parts: frozenset[PartKind],
        failure: Failure | None,
        failures: Mapping[Any, Failure],
    ) -> None:
        self.parts, self.failure, self.failures = parts, failure, failures

    def facts(self, limits: str) -> dict[str, Any] | None:
        """As JSON; None where it may turn out otherwise another time."""
        reasons = [*self.failures.values(), *([self.failure] if self.failure else [])]
        if any(f.retryable or f.type != MediaError.__name__ for f in reasons):
            return None
        return {
            "parts": sorted(self.parts),
            "failure": asdict(self.failure) if self.failure else None,
            "failures": {m: asdict(f) for m, f in self.failures.items()},
            "limits": limits if reasons else None,
        }

    @classmethod
    def of(cls, entry: Entry | None, limits: str) -> _Decoding | None:
        """From an entry; None where there is none, or it holds no longer."""
        facts = entry.facts if entry is not None else None
        try:
            if facts is None or facts["limits"] not in (None, limits):
                return None
            failure = Failure(**facts["failure"]) if facts["failure"] else None
            failures = {m: Failure(**f) for m, f in facts["failures"].items()}
            return cls(frozenset(facts["parts"]), failure, failures)
        except (KeyError, TypeError, AttributeError):
            return None


def _file_digest(path: Path) -> str | None:
    """Hex sha256 of a file; None where it cannot be read."""
    try:
        return file_digest(path)
    except (OSError, ValueError):
        return None
