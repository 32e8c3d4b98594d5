"""The folders of trainings: a new one for each run.

A run writes to ``<save_dir>/<time>-<id>``, and the link ``<save_dir>/latest`` leads to the newest
run. So earlier runs stay as they are, and two trainings can share one ``save_dir``.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from lightning_fabric import Fabric

from common.errors import told
from common.files import part_of
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
        with told(f"trainer.save_dir: {folder.parent} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            part.symlink_to(folder.name)
            part.replace(latest)

    all_ranks(fabric, link)
