"""Every run has a folder of its own, so that earlier runs and their bundles stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning_fabric import Fabric

import train_net
from common.errors import ConfigError
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import keep_bundle, newest_version
from fusion.train.checkpoint import Checkpoint, Progress, save_checkpoint, signature
from fusion.train.run_folder import link_latest, located, run_folder
from tests.support.fusion import media_posts, runs
from tests.support.tiny_models import TINY_CNN

ONE: dict[str, Any] = {"epochs": 1}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder; links are not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def run_folders(save_dir: Path) -> list[Path]:
    """The folders of all runs, the oldest first."""
    folders = [path for path in save_dir.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: path.stat().st_ctime_ns)


def test_second_runs_leave_the_first(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`latest` leads to the newest run; the replaced bundle is kept; `--resume` goes on."""
    config = ["--model_config", str(runs.config_file(few_posts, trainer=ONE))]
    save, bundle = few_posts / "run", few_posts / "bundle"
    assert train_net.main(config) == 0
    [first] = run_folders(save)
    files, version = tree(first), newest_version(bundle)
    assert {"ckpt/last.pt", "ckpt/best.pt", "log/train.jsonl"} <= set(files)
    assert (save / "latest").resolve() == first

    assert train_net.main([*config, "--epoch", "2"]) == 0
    second = (save / "latest").resolve()
    assert second != first
    assert tree(first) == files
    copy = few_posts / f"bundle.{version}"
    assert f"{bundle}: the bundle that was there is kept in {copy}\n" in capsys.readouterr().err
    assert load_bundle(copy).version == version
    assert newest_version(bundle) != version

    # A run goes on in its own folder, whichever is the newest.
    assert train_net.main([*config, "--epoch", "3", "--resume", str(save)]) == 0
    assert (save / "latest").resolve() == second
    assert [e["event"] for e in runs.events(few_posts)].count("begin") == 2
    assert train_net.main([*config, "--epoch", "3", "--resume", str(first)]) == 0
    assert (save / "latest").resolve() == first
    assert runs.checkpoint(few_posts)["progress"]["epoch"] == 3
    assert len(run_folders(save)) == 2


@pytest.mark.parametrize(
    ("resume", "goes_on"),
    [
        ("", True),
        ("one", True),
        ("one/ckpt", True),
        ("one/ckpt/last.pt", True),
        ("latest/ckpt/last.pt", True),
        ("one/ckpt/best.pt", False),
        ("one/ckpt/snapshot-1.pt", False),
        ("../elsewhere/run/ckpt/last.pt", False),
    ],
)
def test_the_last_checkpoint_keeps_its_folder(resume: str, goes_on: bool, tmp_path: Path) -> None:
    """Weights, and runs of another `save_dir`, begin a new folder."""
    fabric, save = Fabric(accelerator="cpu", devices=1), tmp_path / "save"
    (save / "one" / "ckpt").mkdir(parents=True)
    link_latest(fabric, save / "one")
    folder = run_folder(fabric, save, located(save / resume))
    assert (folder.resolve() == save / "one") == goes_on
    assert folder.parent == save


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "save").write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"trainer\.save_dir: .*save cannot be written"):
        link_latest(Fabric(accelerator="cpu", devices=1), tmp_path / "save" / "run")


# Runs that cannot begin


def test_a_false_start_leaves_latest(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong data file or checkpoint: `--resume` finds the earlier run, and no folder is made."""
    config = runs.config_file(few_posts, trainer=ONE)
    assert train_net.main(["--model_config", str(config)]) == 0
    before = tree(few_posts / "run")
    broken, twice = few_posts / "other.pt", few_posts / "twice.json"
    broken.write_bytes(b"no checkpoint")
    train, valid = (json.loads((few_posts / f"{n}.json").read_text()) for n in ("train", "valid"))
    twice.write_text(json.dumps([train[3], *valid]))
    mistakes = {
        "none.json: no such data file": ["--set", "data.valid=none.json"],
        "cannot be read as a checkpoint": ["--resume", str(broken)],
        "holds something that is not a bundle and would": ["--set", f"bundle.out={few_posts}"],
        "posts are too few for 30": ["--set", "ensemble.folds=30"],
        "post 'train3' is in": ["--set", f"data.valid={twice}", "--set", "ensemble.folds=2"],
    }
    for says, options in mistakes.items():
        capsys.readouterr()
        assert train_net.main(["--model_config", str(config), *options]) == 2, says
        assert says in capsys.readouterr().err
        assert tree(few_posts / "run") == before


def test_a_run_without_usable_posts_lists_them(few_posts: Path) -> None:
    config = runs.config_file(few_posts, trainer=ONE)
    none = few_posts / "none.json"
    none.write_text('[{"post_id": "x", "labels": ["nope"]}]')
    wrong = ["--set", f"data.train={none}", "--skip_bad"]
    assert train_net.main(["--model_config", str(config), *wrong]) == 2
    [skipped] = (few_posts / "run").rglob("skipped.jsonl")
    assert "nope" in skipped.read_text()
    assert not (few_posts / "run" / "latest").exists()


# Backbones

SIZES = {"projection": 16, "hidden": 8, "join": 32, "width": 24}


def sign(stage: str, **changes: Any) -> str:
    labels = list(media_posts.COLOURS)
    parts = {"stage": stage, "arch": TINY_CNN, "image_size": 32, "labels": labels, **changes}
    return signature(parts)


def save_stage(folder: Path, signed: str) -> None:
    save_checkpoint(folder / "ckpt" / "last.pt", Checkpoint(signed, Progress(0), {}))


def backbone_config(folder: Path, kind: str) -> Path:
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
    "file": ("video", "--resume takes the folder of a run"),
}


@pytest.mark.parametrize("mistake", BACKBONE_MISTAKES)
def test_checkpoints_of_both_stages_are_read_before_a_backbones_run_begins(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what differs, and no folder is made."""
    kind, says = BACKBONE_MISTAKES[mistake]
    config = backbone_config(tmp_path, kind)
    other = tmp_path / "other"
    other.mkdir()
    match mistake:
        case "arch" | "file":
            save_stage(other, sign("image", arch="resnet18"))
        case "tsn":
            save_stage(other / "tsn", sign("tsn", arch="resnet18"))
        case "lstm":
            save_stage(other / "tsn", sign("tsn"))
            save_stage(other / "lstm", sign("lstm", lstm={**SIZES, "width": 8}, frames=20))
    resume = {"typo": other / "last.pt", "file": other / "ckpt" / "last.pt"}.get(mistake, other)
    assert train_net.main(["--model_config", str(config), "--resume", str(resume)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The bundle


def test_a_bundle_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its version, of a link next to its target; also when it is the working folder."""
    real = tmp_path / "real"
    real.mkdir()
    assert keep_bundle(real) is None
    (real / "bundle.yaml").write_text("version: 20260101T000000Z-1a2b3c4d\n")
    (tmp_path / "links").mkdir()
    served = tmp_path / "links" / "served"
    served.symlink_to(real)
    copy = tmp_path / "real.20260101T000000Z-1a2b3c4d"
    (tmp_path / f".{copy.name}.part").mkdir()  # of a run that was killed while it kept one
    assert keep_bundle(served) == copy
    assert tree(copy) == tree(real)
    monkeypatch.chdir(real)
    assert keep_bundle(Path()) == copy
    names = {path.name for path in tmp_path.rglob("*")} - {"bundle.yaml"}
    assert names == {"links", "real", copy.name, "served"}
