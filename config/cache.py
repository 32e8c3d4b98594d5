"""Settings of the feature cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from common.urls import redact
from config.base import PositiveInt, Seconds, Section


class CacheSettings(Section):
    """Features by the content of their media file and their extractor, so that each is made once.

    Shared by every daemon and script that names the same place. With it, tagging posts again with
    another bundle needs no download and no extraction.
    """

    url: str | None = None
    """A folder (``workshop/cache`` or ``file:///path``), ``redis://host``, or any fsspec URL, as
    ``s3://bucket/prefix``. Null: no cache."""
    max_mb: PositiveInt = 20_000
    """Folder: past this the entries used least recently are deleted. Redis and object stores have
    limits of their own (``maxmemory``, life-cycle rules); there it is the size that ``insighttag
    cache prune`` goes down to."""
    ttl_s: Seconds | None = 90 * 86400
    """Redis only: an entry that is not used for this time is deleted; null keeps it."""
    sources_ttl_s: Annotated[float, Field(ge=0)] | None = None
    """Time for which a URL is trusted to lead to the same file, so that it is not downloaded
    again; null: for ever, 0: never (every file is downloaded, and only then looked up)."""
    timeout_s: Seconds = 1
    """A look-up that takes longer counts as a miss."""
    retry_s: Seconds = 30
    """A cache that failed is left alone for this long."""
    threads: PositiveInt = 4
    """Look-ups at once."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Options of the fsspec file system, as ``{endpoint_url: URL}``; credentials belong into
    the environment."""

    @field_validator("url")
    @classmethod
    def _not_http(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; null switches the cache off")
        if value is not None and value.startswith(("http://", "https://", "embedded://")):
            raise ValueError(
                f"{redact(value)!r} is no cache; use a folder, redis:// or an fsspec URL as s3://"
            )
        return value
