"""A run that cannot begin leaves the earlier one in its folder as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import train_net
from fusion.train.checkpoint import Checkpoint, Progress, save_checkpoint, signature
from tests.support.fusion import media_posts, runs
from tests.support.tiny_models import TINY_CNN
from tests.unit.fusion.test_run_folder import ONE, tree


def twice(folder: Path) -> None:
    """A post of the data to learn from stands in the validation data too."""
    train, valid = (json.loads((folder / f"{n}.json").read_text()) for n in ("train", "valid"))
    (folder / "none.json").write_text(json.dumps([train[3], *valid]))


def refuse(folder: Path, config: Path, *wrong: str) -> str:
    """See that the command ends and moves nothing; gives the list of skipped posts."""
    save = folder / "run"
    before = tree(save)
    assert train_net.main(["--model_config", str(config), *wrong]) == 2
    after = tree(save)
    skipped = after.pop("log/skipped.jsonl", b"").decode()
    assert after == before
    assert not list(save.glob("previous-*"))
    return skipped


MISTAKES = ["data", "skipped", "resume", "bundle", "few posts", "post twice"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_run_that_cannot_begin_moves_nothing(
    mistake: str, few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong data file or checkpoint: the earlier run stays where `--resume` finds it."""
    config = runs.config_file(few_posts, trainer=ONE)
    assert train_net.main(["--model_config", str(config)]) == 0
    none, says = few_posts / "none.json", "none.json: no such data file"
    wrong = ["--set", f"data.valid={none}"]
    if mistake == "skipped":
        none.write_text('[{"post_id": "x", "labels": ["nope"]}]')
        wrong, says = ["--set", f"data.train={none}", "--skip_bad"], "none.json"
    elif mistake == "resume":
        (few_posts / "other.pt").write_bytes(b"no checkpoint")
        wrong, says = ["--resume", str(few_posts / "other.pt")], "cannot be read as a checkpoint"
    elif mistake == "bundle":
        wrong = ["--set", f"bundle.out={few_posts}"]
        says = "holds something that is no bundle and would be replaced"
    elif mistake == "few posts":
        wrong, says = ["--set", "ensemble.folds=30"], "posts are too few for 30"
    elif mistake == "post twice":
        twice(few_posts)
        wrong += ["--set", "ensemble.folds=2", "--set", "ensemble.pool_valid=true"]
        says = "post 'train3' stands in"
    capsys.readouterr()
    skipped = refuse(few_posts, config, *wrong)
    err = capsys.readouterr().err
    assert says in err
    assert "kept" not in err
    assert ("nope" in skipped) == (mistake == "skipped")


# Backbones -------------------------------------------------------------------------------------

SIZES = {"projection": 16, "hidden": 8, "join": 32, "width": 24}


def mark(stage: str, **changes: Any) -> str:
    """What the checkpoints of a stage are signed with."""
    labels = list(media_posts.COLOURS)
    parts = {"stage": stage, "arch": TINY_CNN, "image_size": 32, "labels": labels, **changes}
    return signature(parts)


def stage(folder: Path, sign: str) -> Path:
    """A last checkpoint with that signature; the folder."""
    save_checkpoint(folder / "ckpt" / "last.pt", Checkpoint(sign, Progress(0), {}))
    return folder


def begun(folder: Path, kind: str) -> Path:
    """Posts with media, and what an earlier run has left; the config of another."""
    for name in ("ckpt/last.pt", "tsn/ckpt/last.pt", "weights/tsn.safetensors"):
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_text(name)
    labels = media_posts.write_labels(folder)
    write = media_posts.write_pictures if kind == "image" else media_posts.write_videos
    posts = write(folder, "train", 3)
    content = {
        "task": f"{kind}_backbone",
        "data": {"train": str(posts), "valid": None, "labels": str(labels)},
        "backbone": {"arch": TINY_CNN, "image_size": 32},
        "tsn": {"segments": 2, "test_segments": 3, "frames": 20},
        "lstm": SIZES,
        "trainer": {"n_gpu": 0, "threads": 1, "save_dir": str(folder / "run"), "progress": False},
    }
    config = folder / "train.yaml"
    config.write_text(yaml.safe_dump(content))
    return config


BACKBONE_MISTAKES = {
    "typo": ("image", "no such checkpoint"),
    "arch": ("image", "was made with another arch"),
    "no tsn": ("video", "no such checkpoint"),
    "tsn": ("video", "was made with another arch"),
    "lstm": ("video", "was made with another lstm"),
}


@pytest.mark.parametrize("mistake", BACKBONE_MISTAKES)
def test_a_backbones_run_that_cannot_begin_moves_nothing(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of both stages are read before the earlier run is moved for good."""
    kind, says = BACKBONE_MISTAKES[mistake]
    config = begun(tmp_path, kind)
    other = tmp_path / "other"
    other.mkdir()
    resume = other
    if mistake == "typo":
        resume = other / "last.pt"
    elif mistake == "arch":
        stage(other, mark("image", arch="resnet18"))
    elif mistake == "tsn":
        stage(other / "tsn", mark("tsn", arch="resnet18"))
    elif mistake == "lstm":
        stage(other / "tsn", mark("tsn"))
        stage(other / "lstm", mark("lstm", lstm={**SIZES, "width": 8}, frames=20))
    refuse(tmp_path, config, "--resume", str(resume))
    err = capsys.readouterr().err
    assert says in err
    assert "kept" not in err
