"""The options of a download, a URL, and what it gave."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urldefrag, urlsplit

import typer

from common.cli import ConfigFile, JsonReport, Overrides, argument, flag, option, seconds
from common.post import MediaKind
from common.urls import is_url
from config.load import load_settings
from config.settings import FetchSettings
from fusion.data.data_file import local_path

Status: TypeAlias = Literal["ok", "refused", "retryable"]
"""``refused`` stays so however often one tries; ``retryable`` may succeed later."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of a download."""

    posts: Annotated[Path, argument("posts file or data file", "POSTS")]
    out: Annotated[Path, option("output folder", "DIR")]
    processes: Annotated[int, option("times --connections: downloads at once", min=1)] = 2
    connections: Annotated[int, typer.Option(min=1)] = 16
    per_host: Annotated[
        int, option("downloads from one host at once", "N", "--per_host", min=1)
    ] = 8
    retries: Annotated[
        int, option("retries after temporary failures, each after a longer wait", "N", min=0)
    ] = 4
    backoff: Annotated[float, option("wait before the first retry", "S", parser=seconds)] = 1.0
    timeout: Annotated[
        float | None, option("seconds for one file; fetch.total_timeout_s", "S", parser=seconds)
    ] = None
    local: Annotated[bool, flag("--local", "accept local files in POSTS too")] = False
    verify: Annotated[bool, flag("--verify", "hash files that exist already")] = False
    retry_failed: Annotated[bool, flag("--retry_failed", "try again what was refused before")] = (
        False
    )
    as_json: JsonReport = False
    config: ConfigFile = None
    overrides: Overrides

    @cached_property
    def fetch(self) -> FetchSettings:
        timeout = [] if self.timeout is None else [f"fetch.total_timeout_s={self.timeout}"]
        return load_settings(self.config, [*self.overrides, *timeout]).fetch


@dataclass(slots=True)
class Ask:
    """A source to download.

    Attributes:
        key: The name that it is known by.
        host: Host and port that it leads to; empty for a local file and for what is no URL.
        failed: How many tries have failed.
    """

    key: str
    source: str
    host: str = ""
    local: bool = False
    failed: int = 0


@dataclass(frozen=True, slots=True)
class UrlResult:
    """The result of a URL, as the state keeps it.

    Attributes:
        kinds: Kinds of media that its content may stand for.
        what: Name of its type, for a person: ``PNG picture``.
        reason: Class of the error and one line; empty when ``ok``.
    """

    status: Status
    sha256: str = ""
    extension: str = ""
    size_bytes: int = 0
    kinds: frozenset[MediaKind] = frozenset()
    what: str = ""
    reason: tuple[str, str] = ("", "")

    @property
    def path(self) -> str:
        """Return the content's path, relative to the output folder."""
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
        return Ask(key_of(source), source, host_of(source))
    absolute = str(path.absolute())
    return Ask(key_of(f"local:{absolute}"), absolute, local=True)


def host_of(source: str) -> str:
    """Return the host and port that a URL leads to; empty for what is no URL."""
    try:
        return urlsplit(source).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
