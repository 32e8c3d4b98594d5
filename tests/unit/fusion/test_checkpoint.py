"""Checkpoints: whole or not at all, and nothing in them runs code."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from fusion.train.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        load_checkpoint(path, "{}")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("signature"),
        lambda content: content.update(progress=None),
        lambda content: content["progress"].update(samples=3),
    ],
    ids=["no signature", "no progress", "more progress"],
)
def test_a_checkpoint_of_another_release_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint("{}", Progress(1), {}))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ConfigError, match=rf"{path}: is a checkpoint of another release"):
        load_checkpoint(path, "{}")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The system refuses to write in the midst of the file: one line, and nothing is left of it."""
    path, weights = tmp_path / "last.pt", {"w": torch.zeros(50_000)}
    save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=3), weights))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"the checkpoint cannot be written"):
            save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=4), weights))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(path, "{}").progress.epoch == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
