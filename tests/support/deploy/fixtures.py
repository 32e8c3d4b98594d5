"""Fixtures of the tests of deploy/."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder of this test with a short name.

    A socket's path may have 107 characters. `tmp_path` holds the name of the test, the user and
    two counters, and supervisord adds its process ID: whether that fits depends on the machine.
    """
    with tempfile.TemporaryDirectory(prefix="it-") as folder:
        yield Path(folder).resolve()
