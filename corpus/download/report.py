"""The files that a finished download leaves: manifest, posts with local paths, rejects, summary.

Written from the posts file and the state alone, in the order of the posts file: however often a
run was killed before, they are the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

from common.errors import FetchRefused, MediaError
from common.post import Media
from corpus.download.state import State
from corpus.download.values import Found, Options, ask_for
from corpus.records import (
    AtomicLines,
    BadLine,
    CorpusPost,
    Summary,
    bad_line,
    post_line,
    read_posts,
)

MANIFEST, POSTS, REJECTED, SUMMARY = (
    "manifest.jsonl",
    "posts.jsonl",
    "rejected.jsonl",
    "summary.json",
)
_AMOUNT = re.compile(r": \d+ of \d+ bytes$")
_NOUNS = {"image": "picture", "video": "video", "audio": "sound"}


def write_report(
    options: Options, state: State, tick: Callable[[int], None], asked: Callable[[], object]
) -> Summary:
    """Write the four files.

    Raises:
        Interrupted: `asked` became true before they were whole.
        OSError: The disk is full, or gone.
    """
    summary, out, posts, left_out = Summary("Media"), options.out, 0, 0
    with (
        AtomicLines(out / MANIFEST) as manifest,
        AtomicLines(out / POSTS) as kept,
        AtomicLines(out / REJECTED) as rejected,
    ):
        for entry in read_posts(options.posts):
            tick(1)
            if asked():
                raise Interrupted
            if isinstance(entry, BadLine):
                left_out += 1
                rejected.write(bad_line(entry))
                continue
            posts += 1
            local: list[Media] = []
            for i, media in enumerate(entry.post.media):
                found = _found(media, i, options, state)
                manifest.write(_manifest_line(entry.post.post_id, media, found))
                _count(summary, found)
                if found.status == "ok":
                    local.append(Media(media.kind, found.path))
            kept.write(_local_line(entry, local))
    summary.facts["posts"] = posts
    summary.facts["lines left out"] = left_out
    files, size_bytes = state.totals()
    summary.facts["files"], summary.facts["bytes"] = files, size_bytes
    summary.write(out / SUMMARY)
    return summary


class Interrupted(Exception):
    """A signal came while files were being written; none of them is there in part."""


def _found(media: Media, place: int, options: Options, state: State) -> Found:
    """Return the result of one use of a source."""
    limit = options.fetch.max_media
    if place >= limit:
        return _refused(FetchRefused.__name__, f"beyond fetch.max_media ({limit})")
    found = state.get(ask_for(media.source, options).key)
    if found is None:  # the posts file has changed since it was read
        return _refused(FetchRefused.__name__, "not asked for: run again")
    if found.status == "ok" and media.kind not in found.kinds:
        return _refused(MediaError.__name__, f"is not a {_NOUNS[media.kind]}: {found.what}")
    return found


def _refused(kind: str, message: str) -> Found:
    return Found("refused", reason=(kind, message))


def _manifest_line(post_id: str, media: Media, found: Found) -> str:
    there = found.status == "ok"
    kind, message = found.reason
    content = {
        "post_id": post_id,
        "kind": media.kind,
        "source": media.source,
        "status": "ok" if there else "failed",
        "sha256": found.sha256 if there else None,
        "path": found.path if there else None,
        "bytes": found.size_bytes if there else None,
        "reason": None if there else {"stage": "fetch", "type": kind, "message": message},
    }
    return json.dumps(content, ensure_ascii=False)


def _local_line(entry: CorpusPost, local: list[Media]) -> str:
    """Return the post with its local files; its features lie relative to another folder."""
    post = replace(entry.post, media=tuple(local))
    return post_line(replace(entry, post=post, features=None))


def _count(summary: Summary, found: Found) -> None:
    if found.status == "ok":
        summary.done()
        return
    kind, message = found.reason
    message = _AMOUNT.sub("", message)  # reasons are counted: they must not all differ
    again = " (tried again by the next run)" if found.status == "retryable" else ""
    summary.failed(f"{kind}: {message}{again}")
