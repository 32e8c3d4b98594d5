"""The plain loop: ``loop.py PROCESSES BATCH`` tags ``warm.json``, waits, tags ``posts.json``."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence

import tagger

_tagger: tagger.Tagger | None = None


def load() -> None:
    """Load the models of this process."""
    global _tagger  # noqa: PLW0603 - one a process, as pools have it
    _tagger = tagger.load_tagger()


def tag(ids: Sequence[str]) -> int:
    """Tag a batch."""
    assert _tagger is not None
    return _tagger.tag(ids)


def main() -> None:
    """Tag all posts, and stay until the bench has looked."""
    processes, size = map(int, sys.argv[1:])
    batches = tagger.batches(processes, size)
    with multiprocessing.get_context("spawn").Pool(processes, initializer=load) as pool:
        list(pool.imap_unordered(tag, batches[:processes]))
        tagger.wait_for_go()
        list(pool.imap_unordered(tag, batches[processes:]))
        sys.stdin.read()


if __name__ == "__main__":
    main()
