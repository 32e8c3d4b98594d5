"""The values between the parts of an extraction; they pickle and import nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from common.post import Failure, Media, Modality, Post, Status

Kind: TypeAlias = Literal["text", "audio", "image", "video"]
"""Which of the scripts runs."""

WANTED: Mapping[Kind, frozenset[Modality]] = MappingProxyType(
    {
        "text": frozenset({"text", "ocr"}),
        "audio": frozenset({"audio"}),
        "image": frozenset({"image"}),
        "video": frozenset({"video"}),
    }
)
"""What each script extracts; the words in pictures belong to the text."""

State: TypeAlias = Literal["done", "there", "failed", "rejected", "repeated"]
"""Of a post: extracted now; extracted before; nothing was kept of it; no post; seen before."""


@dataclass(frozen=True, slots=True)
class FailedPart:
    """A line of the failures file.

    Attributes:
        post_id: None where a line of the input names none.
        modality: None where the whole post failed.
    """

    post_id: str | None
    modality: Modality | None
    failure: Failure

    def line(self) -> str:
        """``{post_id, modality, stage, type, message}``."""
        content = {"post_id": self.post_id, "modality": self.modality, **self.failure.as_dict()}
        return json.dumps(content, ensure_ascii=False)

    @property
    def reason(self) -> str:
        """Its class, for counting."""
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

    def as_json(self) -> str:
        """One line, for an actor on another machine."""
        post = self.post
        content = {
            "index": self.index,
            "post_id": post.post_id,
            "text": post.text,
            "ocr": post.ocr,
            "media": [[media.kind, media.source] for media in post.media],
            "digests": dict(self.digests),
            "lost": {m: _failure_dict(failure) for m, failure in self.lost.items()},
        }
        return json.dumps(content)

    @classmethod
    def of_json(cls, line: str) -> Work:
        """What `as_json` wrote."""
        content: dict[str, Any] = json.loads(line)
        post = Post(
            content["post_id"],
            text=content["text"],
            media=tuple(Media(kind, source) for kind, source in content["media"]),
            ocr=content["ocr"],
        )
        lost = {m: Failure(**failure) for m, failure in content["lost"].items()}
        return cls(content["index"], post, content["digests"], lost)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one line of the input.

    Attributes:
        statuses: Of the modalities of this script.
        node: Where it was done; empty on this machine.
    """

    index: int
    post_id: str | None
    state: State
    statuses: Mapping[Modality, Status] = field(default_factory=dict)
    failures: tuple[FailedPart, ...] = ()
    node: str = ""

    def as_json(self) -> str:
        """One line, for the driver on another machine."""
        content = {
            "index": self.index,
            "post_id": self.post_id,
            "state": self.state,
            "statuses": dict(self.statuses),
            "failures": [[part.modality, _failure_dict(part.failure)] for part in self.failures],
            "node": self.node,
        }
        return json.dumps(content)

    @classmethod
    def of_json(cls, line: str) -> Result:
        """What `as_json` wrote."""
        content: dict[str, Any] = json.loads(line)
        failures = tuple(
            FailedPart(content["post_id"], modality, Failure(**failure))
            for modality, failure in content["failures"]
        )
        return cls(**{**content, "failures": failures})


Entry: TypeAlias = Work | Result
"""A line of the input: something to do, or settled already (no post, or seen before)."""


def _failure_dict(failure: Failure) -> dict[str, Any]:
    return {**failure.as_dict(), "retryable": failure.retryable}
