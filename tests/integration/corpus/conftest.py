"""Fixtures of the tests that extract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers import runner
from workers.local import LocalPool


@pytest.fixture(scope="module")
def models_in_this_process() -> Iterator[None]:
    """Run scripts without workers, whose models take long to load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner, "ProcessPool", lambda settings, fuse, **_: LocalPool(settings, fuse=fuse)
        )
        yield
