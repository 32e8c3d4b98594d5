"""Stages of the demo run side by side; a file of its own, which the processes import quickly."""

import pytest

from demo.parallel import map_items, run_jobs, tell


def _square(number: int) -> int:
    return number * number


def _add(first: int, second: int) -> int:
    tell("sum", 1, 1, "done")
    return first + second


def _refuse(number: int) -> int:
    raise ValueError(f"not {number}")


def _nothing() -> None:
    """A set-up with nothing to load."""


def test_jobs_and_items_run_in_processes_and_their_errors_arrive() -> None:
    """Results come in order; an error in a child is raised here."""
    assert map_items("squares", _square, [1, 2, 3], _nothing, ()) == [1, 4, 9]
    assert run_jobs({"sum": (_add, (1, 2))}) == {"sum": 3}
    with pytest.raises(ValueError, match="not 5"):
        map_items("refused", _refuse, [5], _nothing, ())
