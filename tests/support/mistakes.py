"""Reader of the one line that tells of a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def one_line(kind: type[Exception], *named: str, match: str | None = None) -> Iterator[Any]:
    """The error that is raised: one line, in which each of ``named`` stands."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    for word in named:
        assert word in str(caught.value)
