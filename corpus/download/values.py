"""A URL, what it gave, and the options of a download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urldefrag

from common.post import MediaKind
from config.settings import FetchSettings
from fusion.data.data_file import is_url, local_path

Status: TypeAlias = Literal["ok", "refused", "retryable"]
"""``refused`` stays so however often one tries; ``retryable`` may succeed later."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a download.

    Attributes:
        processes: Times `connections` gives the downloads at once; all run in this process.
        per_host: Downloads from one host at once.
        retries: Tries after the first one that failed in a way that may pass.
        backoff_s: Wait before the first of them; it doubles each time, up to `backoff_max_s`.
        local: Take local files too, relative to the posts file.
        verify: Hash the files that are there already instead of looking at their size.
        retry_failed: Try again what an earlier run was refused.
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
    """A source to download, and the key that it is known by."""

    key: str
    source: str
    local: bool = False


@dataclass(frozen=True, slots=True)
class UrlResult:
    """The result of a URL, as the state keeps it.

    Attributes:
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
        """Path of the content, relative to the output folder."""
        return f"media/{self.sha256[:2]}/{self.sha256}.{self.extension}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one download.

    Attributes:
        incoming: Name of the finished file in the folder of incoming ones; empty when none.
        retry_after_s: How long the host asks to be left alone.
        unreachable: The host was not reached.
        broken: The disk or the output folder failed: one line; nothing can go on.
    """

    key: str
    result: UrlResult
    incoming: str = ""
    retry_after_s: float | None = None
    unreachable: bool = False
    broken: str = ""


def key_of(source: str) -> str:
    """Return the key of a source: 128 bits of its hash, without the fragment."""
    try:
        plain = urldefrag(source).url
    except ValueError:
        plain = source
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def ask_for(source: str, options: Options) -> Ask:
    """Return how a source of the posts file is asked for."""
    path = None if is_url(source) or not options.local else local_path(source, options.posts)
    if path is None:
        return Ask(key_of(source), source)
    absolute = str(Path(path).absolute())
    return Ask(key_of(f"local:{absolute}"), absolute, local=True)
