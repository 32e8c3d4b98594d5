"""Posts to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fusion import support


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """A folder with 120 posts to learn from and 48 to validate on."""
    support.write_posts(tmp_path, "train", 120, 1)
    support.write_posts(tmp_path, "valid", 48, 2)
    return tmp_path


@pytest.fixture
def few_posts(tmp_path: Path) -> Path:
    """A folder with 37 posts to learn from and 15 to validate on: no number divides them."""
    support.write_posts(tmp_path, "train", 37, 1)
    support.write_posts(tmp_path, "valid", 15, 2)
    return tmp_path
