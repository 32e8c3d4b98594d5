"""One training at a time writes a folder; and the bundle that it replaces is kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from common.errors import ConfigError
from fusion.train import run_folder
from fusion.train.run_folder import FUSION, RunFolder, keep_bundle
from tests.unit.fusion.test_run_folder import Killed, tree


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A folder with what a run has left."""
    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    (tmp_path / "run" / "ckpt" / "last.pt").write_text("last")
    return tmp_path / "run"


def test_two_trainings_do_not_write_one_folder(
    used: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is told, and moves nothing of the first."""
    monkeypatch.setattr(run_folder, "_LOCK_WAIT_S", 0.2)
    folder = RunFolder(fabric, used, FUSION)
    says = re.escape(f"{used}: another training is writing there")
    with (
        (used / ".lock").open("wb") as other,
        contextlib.ExitStack() as stack,
    ):
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=says):
            stack.enter_context(folder.locked())
    with folder.locked():
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_trained_on(
    code: int,
    used: Path,
    fabric: Fabric,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As NFS without its lock daemon: a warning, and the run goes on."""
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with RunFolder(fabric, used, FUSION).locked():
        pass
    said = f"warning: {used}: its file system has no locks ({os.strerror(code)})"
    assert said in capsys.readouterr().err


def test_a_lock_that_fails_is_one_line(
    used: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else the file system says."""
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with contextlib.ExitStack() as stack:
        says = re.escape(f"{used / '.lock'}: cannot be locked: Input/output error")
        with pytest.raises(ConfigError, match=says):
            stack.enter_context(RunFolder(fabric, used, FUSION).locked())


def failing(code: int) -> Any:
    """A system call that gives an error."""

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# The bundle --------------------------------------------------------------------------------------


def test_a_bundle_is_kept_once(tmp_path: Path) -> None:
    """Under its version, of a link beside its target; where there is none, nothing is kept."""
    real = tmp_path / "real"
    real.mkdir()
    assert keep_bundle(real) is None
    (real / "bundle.yaml").write_text("version: 20260101T000000Z-1a2b3c4d\n")
    (tmp_path / "links").mkdir()
    served = tmp_path / "links" / "served"
    served.symlink_to(real)
    kept = keep_bundle(served)
    assert kept == tmp_path / "real.20260101T000000Z-1a2b3c4d"
    assert tree(kept) == tree(real)
    assert keep_bundle(served) == kept
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "bundle.yaml") == [
        "links",
        "real",
        kept.name,
        "served",
    ]


def test_the_bundle_of_the_working_folder_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``bundle.out: .`` has no name of its own, the folder has."""
    here = tmp_path / "bundle"
    here.mkdir()
    (here / "bundle.yaml").write_text("version: 20260101T000000Z-1a2b3c4d\n")
    monkeypatch.chdir(here)
    assert keep_bundle(Path()) == tmp_path / "bundle.20260101T000000Z-1a2b3c4d"


def test_a_kill_while_a_bundle_is_kept_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run clears what there is of the copy, and keeps the bundle."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "bundle.yaml").write_text("version: 20260101T000000Z-1a2b3c4d\n")

    def die(path: Path, target: Path) -> None:
        (path / "half").write_text("")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            keep_bundle(real)
    assert len(list(tmp_path.iterdir())) == 2
    kept = keep_bundle(real)
    assert kept is not None
    assert tree(kept) == tree(real)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", kept.name]
