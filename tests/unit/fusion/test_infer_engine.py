"""Chunks through taggers in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from threading import Thread
from typing import Any

from fusion.data.data_file import Record
from fusion.infer.input import Bad
from fusion.infer.processes import Outcome, run_chunks

PATIENCE_S = 90.0


class Idle:
    """Has nothing to do: the chunks below are of bad posts only."""

    def run(self, posts: Sequence[Any]) -> list[Outcome]:
        """No outcomes of no posts."""
        return [*posts]

    def close(self) -> None:
        """Nothing to free."""


def make(device: str) -> Idle:
    """A tagger for any device."""
    return Idle()


def test_chunks_and_outcomes_larger_than_a_pipe_holds() -> None:
    """Both ways at once, several megabytes each: all come back in order, nothing hangs."""
    chunks: list[list[Record | Bad]] = [[Bad(f"p{i}", "x" * 3_000_000)] for i in range(8)]
    found: list[list[Outcome]] = []
    work = Thread(
        target=lambda: found.extend(run_chunks(make, ["cpu", "cpu"], chunks)), daemon=True
    )
    work.start()
    work.join(PATIENCE_S)
    hangs = work.is_alive()
    for process in multiprocessing.active_children():
        process.kill()
    assert not hangs
    assert found == chunks
