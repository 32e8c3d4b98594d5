"""What an earlier run left in a folder is kept when another one begins there."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

import train_net
from common.errors import ConfigError
from fusion.bundle.bundle import load_bundle, newest_version
from fusion.train.run_folder import BACKBONES, FUSION, RunFiles, RunFolder
from tests.support.fusion import runs

ONE: dict[str, Any] = {"epochs": 1}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, without the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def under(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Of a tree, the files of one folder in it, by their names there."""
    start = f"{name}/"
    return {path[len(start) :]: data for path, data in files.items() if path.startswith(start)}


def test_a_second_run_keeps_the_first(posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, logs, report and bundle of every run are whole, and a line says where."""
    config = ["--model_config", str(runs.config_file(posts, trainer=ONE, report={"enabled": True}))]
    save, bundle = posts / "run", posts / "bundle"
    assert train_net.main(config) == 0
    assert "kept" not in capsys.readouterr().err
    first, version = tree(save), newest_version(bundle)
    assert {"ckpt/last.pt", "log/train.jsonl", "report/report.html"} <= set(first)

    assert train_net.main([*config, "--epoch", "2"]) == 0
    said = capsys.readouterr().err
    assert f"{save}: holds an earlier run, which is kept in {save / 'previous-1'}\n" in said
    assert under("previous-1", tree(save)) == first
    assert [e["event"] for e in runs.events(posts)].count("begin") == 1
    assert len(list((save / "log" / "tensorboard").iterdir())) == 1
    kept = posts / f"bundle.{version}"
    assert f"{bundle}: the bundle that was there is kept in {kept}\n" in said
    assert load_bundle(kept).version == version
    assert newest_version(bundle) != version

    assert train_net.main([*config, "--epoch", "3", "--resume", str(save)]) == 0
    assert "an earlier run" not in capsys.readouterr().err
    assert [e["event"] for e in runs.events(posts)].count("begin") == 2
    assert runs.checkpoint(posts)["progress"]["epoch"] == 3
    again = ["--epoch", "2", "--resume", str(save / "previous-1")]
    assert train_net.main([*config, *again]) == 0
    assert runs.checkpoint(posts)["progress"]["epoch"] == 2
    assert under("previous-1", tree(save)) == first
    assert runs.checkpoint(posts, "run/previous-2")["progress"]["epoch"] == 3
    assert not list(posts.glob(".bundle*"))


def test_weights_of_the_folder_itself_begin_a_new_run(
    few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--resume <save_dir>/ckpt/best.pt`` finds the file where it was moved to."""
    config = ["--model_config", str(runs.config_file(few_posts, trainer=ONE))]
    best = few_posts / "run" / "ckpt" / "best.pt"
    assert train_net.main(config) == 0
    before = best.read_bytes()
    assert train_net.main([*config, "--resume", str(best)]) == 0
    assert "is kept in" in capsys.readouterr().err
    assert (few_posts / "run" / "previous-1" / "ckpt" / "best.pt").read_bytes() == before


def test_folds_are_kept_and_gone_on_with(posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """k-fold runs move whole; with ``--resume`` nothing moves, and a wrong one moves nothing."""
    sections = {"trainer": ONE, "ensemble": {"folds": 2}}
    config = ["--model_config", str(runs.config_file(posts, **sections))]
    save = posts / "run"
    assert train_net.main(config) == 0
    first = tree(save)
    assert train_net.main([*config, "--resume", str(save)]) == 0
    assert not (save / "previous-1").exists()
    assert train_net.main([*config, "--resume", str(posts)]) == 2
    again = tree(save)
    assert set(again) == set(first)
    capsys.readouterr()
    assert train_net.main(config) == 0
    assert capsys.readouterr().err.count("which is kept in") == 1
    assert under("previous-1", tree(save)) == again
    done = [json.loads((save / f"fold-{i}" / "done.json").read_text()) for i in (1, 2)]
    assert [fold["epochs"] for fold in done] == [1, 1]


@pytest.mark.slow
def test_of_several_processes_one_moves(few_posts: Path) -> None:
    """Two processes: one line, one folder, nothing of the second run in it."""
    config = runs.config_file(few_posts, trainer={**ONE, "processes": 2, "batch_size": 8})
    given = ["--model_config", str(config)]
    assert train_net.main([*given, "--set", "trainer.processes=1"]) == 0
    first = tree(few_posts / "run")
    code, _, err = runs.command(*given)
    assert code == 0, err
    assert err.count("which is kept in") == 1
    assert under("previous-1", tree(few_posts / "run")) == first
    assert not (few_posts / "run" / "previous-2").exists()


# The moving itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A folder with all that runs leave, and something that is no run's."""
    names = ["ckpt/last.pt", "ckpt/best.pt", "log/train.jsonl", "log/tensorboard/events", "tsn/a"]
    names += ["weights/tsn.safetensors", "notes.txt", "frames/1/a", "previous-4/ckpt/last.pt"]
    for name in names:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "run"


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


@contextlib.contextmanager
def killed_after(renames: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the process die before the next rename, in whatever method."""
    left, rename = [renames], Path.rename

    def counted(path: Path, target: Path) -> Path:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        yield


@pytest.mark.parametrize("moved", range(4))
@pytest.mark.parametrize("back", range(4))
def test_a_kill_while_moving_is_undone(
    moved: int, back: int, used: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any rename, and again while it is taken back: the earlier run is whole again."""
    before = tree(used)
    folder = RunFolder(fabric, used, BACKBONES)
    with (
        killed_after(moved, monkeypatch),
        contextlib.suppress(Killed),
        folder.beginning(None),
    ):
        monkeypatch.setattr(RunFolder, "_take_back", lambda self: None)  # as after a real kill
        raise Killed
    monkeypatch.undo()
    assert (used / ".previous").exists()
    with (
        killed_after(back, monkeypatch),
        contextlib.suppress(Killed),
        folder.beginning(used),
    ):
        pass
    with folder.beginning(used) as place:
        assert place == used
    assert tree(used) == before


def test_what_is_served_stays_where_it_is(used: Path, fabric: Fabric) -> None:
    """Weights can be loaded all the time, and those of before are not the new ones."""
    folder, weights = RunFolder(fabric, used, BACKBONES), used / "weights" / "tsn.safetensors"
    with folder.beginning(None):
        assert weights.read_text() == "weights/tsn.safetensors"
    new = used / "weights" / ".new"
    new.write_text("new")
    new.replace(weights)
    kept = used / "previous-5"
    assert (kept / "weights" / "tsn.safetensors").read_text() == "weights/tsn.safetensors"
    assert sorted(path.name for path in kept.iterdir()) == ["ckpt", "log", "tsn", "weights"]
    left = {path.name for path in used.iterdir()} - {".lock"}
    assert left == {"weights", "notes.txt", "frames", "previous-4", "previous-5"}


@pytest.mark.parametrize("name", ["", "other", "previous-", "previous-1/../ckpt", "previous-1\n"])
def test_a_marker_that_names_no_kept_run_deletes_nothing(
    name: str, used: Path, fabric: Fabric
) -> None:
    """An empty name would be the folder itself, and all in it its own copy."""
    (used / ".previous").write_text(name)
    before, folder = tree(used), RunFolder(fabric, used, BACKBONES)
    with (
        pytest.raises(ConfigError, match=re.escape(f"{used / '.previous'}: must name the folder")),
        folder.beginning(None),
    ):
        pass
    assert tree(used) == before


def test_an_error_is_not_hidden_by_what_cannot_be_taken_back(
    used: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails while the run ends: it says why it has ended, and the next takes back."""
    before, folder = tree(used), RunFolder(fabric, used, BACKBONES)

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    def begin() -> None:
        with folder.beginning(None):
            monkeypatch.setattr(Path, "rename", full)
            raise ConfigError("no such label map")

    with pytest.raises(ConfigError, match="no such label map"):
        begin()
    monkeypatch.undo()
    assert (used / ".previous").exists()
    with folder.beginning(used):
        assert tree(used) == before


@pytest.mark.parametrize("name", ["ckpt/last.pt", "ckpt/best.pt", "tsn", "weights", ""])
def test_what_a_killed_run_has_moved_is_found_under_its_name(
    name: str, used: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--resume <save_dir>/previous-N/…`` is what it was when the command was typed."""
    folder = RunFolder(fabric, used, BACKBONES)
    with monkeypatch.context() as patch, contextlib.suppress(Killed), folder.beginning(None):
        patch.setattr(RunFolder, "_take_back", lambda self: None)
        raise Killed
    named = used / "previous-5" / name
    wanted = named.read_bytes() if named.is_file() else tree(named)
    with folder.beginning(named) as place:
        assert place is not None
        assert wanted == (place.read_bytes() if place.is_file() else tree(place))
    assert (used / "previous-5" / "ckpt" / "last.pt").exists()
    assert not (used / "ckpt").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "snapshot-1.pt", "best.pt"])
def test_weights_among_the_checkpoints_begin_a_new_run(
    name: str, used: Path, fabric: Fabric
) -> None:
    """Only the last checkpoint is where the run in the folder stopped."""
    (used / "ckpt" / name).write_text(name)
    folder = RunFolder(fabric, used, BACKBONES)
    for same in (used, used / "ckpt", used / "ckpt" / "last.pt"):
        with folder.beginning(same) as place:
            assert place == same
    with folder.beginning(used / "ckpt" / name) as place:
        assert place == used / "previous-5" / "ckpt" / name
        assert place.read_text() == name


@pytest.mark.parametrize(
    ("files", "left"),
    [(FUSION, ["log/skipped.jsonl"]), (FUSION, ["data/train.json"]), (FUSION, [])],
)
def test_a_folder_without_a_run_is_left_alone(
    files: RunFiles, left: list[str], tmp_path: Path, fabric: Fabric
) -> None:
    """A start that failed leaves a list of posts, which is no run."""
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with RunFolder(fabric, tmp_path, files).beginning(None):
        assert sorted(tree(tmp_path)) == left
