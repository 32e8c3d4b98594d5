"""Posts to train on: written once in a session, and copied for each test."""

import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.fusion import support


@pytest.fixture(scope="session")
def _all_posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    for name, train, valid in (("many", 120, 48), ("few", 37, 15)):
        (folder / name).mkdir()
        support.write_posts(folder / name, "train", train, 1)
        support.write_posts(folder / name, "valid", valid, 2)
    return folder


@pytest.fixture
def posts(_all_posts: Path, tmp_path: Path) -> Path:
    """A folder with 120 posts to train on and 48 to validate on."""
    return shutil.copytree(_all_posts / "many", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def few_posts(_all_posts: Path, tmp_path: Path) -> Path:
    """A folder with 37 posts to train on and 15 to validate on: no number divides them."""
    return shutil.copytree(_all_posts / "few", tmp_path, dirs_exist_ok=True)


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes are forked from a server that has loaded torch already."""
    monkeypatch.setattr(get_context("spawn"), "Process", forked.process_type())
