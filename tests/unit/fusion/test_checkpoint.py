"""Checkpoints: whole or not at all, and nothing in them runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from fusion.train.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from tests.support.fusion import runs
from tests.support.processes import python


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
        lambda content: content.pop("schedule"),
        lambda content: content.update(progress=None),
        lambda content: content["progress"].update(samples=3),
    ],
    ids=["no signature", "no schedule", "no progress", "more progress"],
)
def test_a_checkpoint_of_another_release_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint("{}", Progress(1), {}))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ConfigError, match=rf"{path}: is a checkpoint of another release"):
        load_checkpoint(path, "{}")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while saving: the file from before is whole and nothing lies beside it."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=3), {}))

    def full(*_: Any, **__: Any) -> None:
        path.with_name(".last.pt.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"cannot be written.*No space left"):
        save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=4), {}))
    assert load_checkpoint(path, "{}").progress.epoch == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_leaves_the_checkpoint_before(few_posts: Path) -> None:
    """The command, with files limited to less than a checkpoint: one line for it, and exit 2.

    The limit makes the system refuse the write as a full disk does, in the middle of the file.
    """
    config = runs.config_file(few_posts, trainer={"epochs": 1, "tensorboard": False})
    runs.run(few_posts, trainer={"epochs": 1})
    earlier = (few_posts / "run" / "latest" / "ckpt").resolve()
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    size = min(len(content) for content in before.values()) // 2
    script = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        "import train_net; sys.exit(train_net.main(sys.argv[1:]))"
    )
    done = python("-c", script, "--model_config", str(config), timeout_s=240)
    assert done.returncode == 2, done.stderr
    [said] = done.stderr.strip().splitlines()
    assert "the checkpoint cannot be written" in said
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
