"""What crosses between the parent and its downloading processes, and what is kept of a URL."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urldefrag

from common.post import MEDIA_KINDS, MediaKind
from config.settings import FetchSettings

Status: TypeAlias = Literal["ok", "refused", "retryable"]
"""``refused`` will not be had by trying again; ``retryable`` may be."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to download.

    Attributes:
        connections: Of each process.
        per_host: Downloads from one host at a time, over all processes.
        retries: Tries after the first one that failed in a way that may pass.
        backoff_s: Wait before the first of them; it doubles each time, up to `backoff_max_s`.
        local: Take local files too, relative to the posts file.
        verify: Hash the files that are there already instead of looking at their size.
        retry_failed: Try again what was refused in an earlier run.
    """

    posts: Path
    out: Path
    fetch: FetchSettings
    processes: int = 2
    connections: int = 16
    per_host: int = 8
    retries: int = 4
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    local: bool = False
    verify: bool = False
    retry_failed: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Parent ─► process: download this."""

    key: str
    source: str
    local: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a URL gave, as it is kept.

    Attributes:
        status: Whether it is there, and if not, whether it is worth another try.
        sha256: Of the content; empty unless ``ok``.
        extension: Of the sniffed type, without the dot.
        kinds: What posts may use it as.
        what: Name of its type, for a person: ``PNG picture``.
        reason: Class of the error and one line; empty when ``ok``.
    """

    status: Status
    sha256: str = ""
    extension: str = ""
    size_bytes: int = 0
    kinds: frozenset[MediaKind] = field(default_factory=frozenset)
    what: str = ""
    reason: tuple[str, str] = ("", "")

    @property
    def path(self) -> str:
        """Where the content lies, relative to the output folder."""
        return f"media/{self.sha256[:2]}/{self.sha256}.{self.extension}"


@dataclass(frozen=True, slots=True)
class Answer:
    """Process ─► parent: how one download went.

    Attributes:
        incoming: Name of the finished file in the folder of incoming ones; empty when none.
        retry_after_s: How long the host asks to be left alone.
        unreachable: The host was not reached.
        broken: The disk or the output folder failed: one line; nothing can go on.
    """

    key: str
    found: Found
    incoming: str = ""
    retry_after_s: float | None = None
    unreachable: bool = False
    broken: str = ""


def key_of(source: str) -> str:
    """What a source is known by: 128 bits of its hash, without the fragment."""
    try:
        plain = urldefrag(source).url
    except ValueError:
        plain = source
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def pack_kinds(kinds: frozenset[MediaKind]) -> str:
    """Kinds as one text, always in the same order."""
    return ",".join(kind for kind in MEDIA_KINDS if kind in kinds)


def unpack_kinds(text: str) -> frozenset[MediaKind]:
    """The reverse of `pack_kinds`."""
    return frozenset(kind for kind in MEDIA_KINDS if kind in text.split(","))
