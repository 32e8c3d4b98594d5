"""The folders that a training writes: a new one for each run, and the bundle.

A run writes to ``<save_dir>/<time>-<id>``, and the link ``<save_dir>/latest`` leads to the newest
run. So earlier runs stay as they are, and two trainings can share one ``save_dir``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from lightning_fabric import Fabric

from common.errors import BundleError, ConfigError
from common.files import part_of, publish
from fusion.bundle.bundle import ABOUT, newest_version
from fusion.train.checkpoint import LAST
from fusion.train.distributed import all_ranks

LATEST = "latest"


def located(resume: Path | None) -> Path | None:
    """Return what ``--resume`` names, a ``save_dir`` replaced by its latest run."""
    if resume is None or not (resume / LATEST).is_dir():
        return resume
    return (resume / LATEST).resolve()


def run_folder(fabric: Fabric, save_dir: Path, resume: Path | None) -> Path:
    """Return the folder of this run; nothing is made yet.

    It is that of the run to go on with if that one lies in ``save_dir``, and else a new one:
    weights, a bundle or a ``.pth`` begin a new run. ``resume`` is what `located` returned.
    """
    earlier = _run_of(resume) if resume is not None else None
    if earlier is not None and earlier.parent == save_dir.resolve():
        return save_dir / earlier.name
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return save_dir / str(fabric.broadcast(name))


def _run_of(resume: Path) -> Path | None:
    """Return the run to go on with; None if ``resume`` only gives weights."""
    path = resume.resolve()
    if path.is_dir():
        return path.parent if path.name == "ckpt" else path
    return path.parent.parent if path.name == LAST else None


def link_latest(fabric: Fabric, folder: Path) -> None:
    """Make the run's folder, and let ``latest`` lead to it."""

    def link() -> None:
        if not fabric.is_global_zero:
            return
        latest = folder.parent / LATEST
        part = part_of(latest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            part.symlink_to(folder.name)
            part.replace(latest)
        except OSError as error:
            raise ConfigError(
                f"trainer.save_dir: {folder.parent} cannot be written: {error}"
            ) from error

    all_ranks(fabric, link)


def refuse_foreign(bundle: Path) -> None:
    """Check that a folder may be replaced by a bundle."""
    try:
        other = bundle.exists() and not (bundle / ABOUT).exists() and any(bundle.iterdir())
    except OSError as error:
        raise ConfigError(f"bundle.out: {bundle}: cannot be a bundle's folder: {error}") from error
    if other:
        raise ConfigError(
            f"bundle.out: {bundle} holds something that is no bundle and would be replaced: "
            "name another folder"
        )


def keep_bundle(bundle: Path) -> Path | None:
    """Keep the bundle that will be replaced, next to it as ``NAME.VERSION``; return the copy.

    The bundle that is served stays where it is; files are hard links where the file system has
    them. Of a link, the bundle that it leads to is kept under that one's name.
    """
    source = bundle.resolve()
    version = newest_version(source)
    if version is None:
        return None
    copy = source.with_name(f"{source.name}.{version}")
    if copy.exists():
        return copy
    part = part_of(copy)
    try:
        if part.exists():  # of a run that was killed here
            shutil.rmtree(part)
        shutil.copytree(source, part, copy_function=_link)
        publish(part, copy)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BundleError(f"{bundle}: the bundle there cannot be kept: {error}") from error
    return copy


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
