"""The folder of a run: one training at a time, and what an earlier one left there is kept.

A run that does not go on with the one in its folder moves that one's files to ``previous-1``,
``previous-2`` … inside it, first of all. Until data and weights to start from are read this can be
taken back: by the run itself when they are wrong, or, when it was killed, by the next one, which
``.previous`` tells which folder it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lightning_fabric import Fabric

from common.errors import BundleError, ConfigError
from common.files import part_of, publish, write_whole
from common.progress import notice
from fusion.bundle.bundle import ABOUT, newest_version
from fusion.train.distributed import agree
from fusion.train.resume import LAST

_LOCK, _MOVING = ".lock", ".previous"
_KEPT = re.compile(r"previous-(\d+)", re.ASCII)
_LOCK_WAIT_S = 10.0
"""A run that was killed may take a moment to end in all of its processes."""
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
"""Of file systems without locks, as NFS without its lock daemon."""
_SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class RunFiles:
    """What a training leaves in its folder.

    Attributes:
        own: Names of its files and folders, a regular expression.
        served: Folders that others may be reading: they stay, and a copy is kept.
    """

    own: str
    served: tuple[str, ...] = ()


FUSION = RunFiles(r"ckpt|log|report|folds\.json|fold-\d+")
BACKBONES = RunFiles("ckpt|log|tsn|lstm", ("weights",))


class RunFolder:
    """The folder ``trainer.save_dir``; only the first process of a training touches it."""

    def __init__(self, fabric: Fabric, folder: Path, files: RunFiles) -> None:
        self._fabric, self._folder, self._files = fabric, folder, files

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other training write here.

        Raises:
            ConfigError: One does, or the folder cannot be written.
        """
        lock: IO[bytes] | None = agree(self._fabric, self._lock)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    @contextlib.contextmanager
    def beginning(self, resume: Path | None, *, moves: bool = True) -> Iterator[Path | None]:
        """Move an earlier run aside, for good only when the block ends well.

        Args:
            resume: What the run starts from; where it lies in this folder and is not the
                beginning of a new run, nothing is moved.
            moves: False leaves the earlier run where it is.

        Yields:
            Where that lies now.

        Raises:
            ConfigError: The folder cannot be written.
        """
        found = agree(self._fabric, lambda: self._begin(resume, moves=moves))
        where: Path | None = self._fabric.broadcast(found)
        try:
            yield where
        except BaseException:
            if self._fabric.is_global_zero:
                # Why the run has ended matters more, and the next one takes back the rest.
                with contextlib.suppress(OSError, ConfigError):
                    self._take_back()
            raise
        agree(self._fabric, self._settle)

    # Parts ------------------------------------------------------------------------------------

    def _lock(self) -> IO[bytes] | None:
        if not self._fabric.is_global_zero:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / _LOCK).open("wb")
        except OSError as error:
            raise self._unwritable(error) from error
        end = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    lock.close()
                    raise ConfigError(
                        f"{self._folder}: another training is writing there: wait for it, or name "
                        "another --save_dir"
                    ) from error
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    lock.close()
                    raise ConfigError(f"{lock.name}: cannot be locked: {error.strerror}") from error
                notice(
                    f"warning: {self._folder}: its file system has no locks ({error.strerror}): "
                    "see to it that no other training writes there"
                )
                return lock
            else:
                return lock

    def _begin(self, resume: Path | None, *, moves: bool) -> Path | None:
        if not self._fabric.is_global_zero:
            return None
        try:
            self._take_back()  # what a killed run has not settled
            if not moves or self._goes_on(resume) or not self._holds_a_run():
                return resume
            # After a kill the number is the same again, and a path into that folder is one.
            return self._move(resume)
        except OSError as error:
            with contextlib.suppress(OSError, ConfigError):
                self._take_back()
            raise self._unwritable(error) from error

    def _goes_on(self, resume: Path | None) -> bool:
        """Whether the run starts where the one in this folder stopped."""
        if resume is None:
            return False
        place, ckpt = self._folder.resolve(), (self._folder / "ckpt").resolve()
        return resume.resolve() in {place, ckpt} or (
            resume.name == LAST and resume.parent.resolve() == ckpt
        )

    def _holds_a_run(self) -> bool:
        log = self._folder / "log"
        return any(
            entry.is_file() or any(f for f in entry.rglob("*") if f.is_file() and not _listed(f))
            for entry in self._own()
            if entry != log or (log / "train.jsonl").exists()
        )

    def _own(self) -> list[Path]:
        wanted = re.compile(self._files.own)
        return sorted(path for path in self._folder.iterdir() if wanted.fullmatch(path.name))

    def _move(self, resume: Path | None) -> Path | None:
        taken = (_KEPT.fullmatch(path.name) for path in self._folder.iterdir())
        number = 1 + max((int(found[1]) for found in taken if found), default=0)
        aside = self._folder / f"previous-{number}"
        write_whole(self._folder / _MOVING, aside.name.encode())
        aside.mkdir()
        where = resume
        for entry in self._own():
            if resume is not None and resume.resolve().is_relative_to(entry.resolve()):
                where = aside / entry.name / resume.resolve().relative_to(entry.resolve())
            entry.rename(aside / entry.name)
        for name in self._files.served:
            if (self._folder / name).is_dir():
                _link_tree(self._folder / name, aside / name)
        return where

    def _aside(self) -> Path | None:
        """Where a run that is not settled has moved an earlier one; None where there is none.

        Raises:
            ConfigError: The marker does not tell.
        """
        marker = self._folder / _MOVING
        try:
            name = marker.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        if not _KEPT.fullmatch(name):
            raise ConfigError(
                f"{marker}: must name the folder that an earlier run was moved to, previous-N, and "
                f"is {name[:40]!r}: write that name into it; or, to leave everything where it is, "
                "delete it"
            )
        return self._folder / name

    def _take_back(self) -> None:
        """Undo `_move`, wherever it was interrupted."""
        aside = self._aside()
        if aside is None:
            return
        for entry in aside.iterdir() if aside.is_dir() else ():
            place = self._folder / entry.name
            if entry.name in self._files.served:
                shutil.rmtree(entry)
                continue
            if (place / _SKIPPED).exists():  # tells why the new run ended before it began
                (place / _SKIPPED).replace(entry / _SKIPPED)
            if place.is_dir():
                shutil.rmtree(place)
            entry.rename(place)
        if aside.is_dir():
            aside.rmdir()
        (self._folder / _MOVING).unlink()

    def _settle(self) -> None:
        if not self._fabric.is_global_zero:
            return
        try:
            aside = self._aside()
            if aside is None:
                return
            (self._folder / _MOVING).unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        notice(f"{self._folder}: holds an earlier run, which is kept in {aside}")

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._folder}: cannot be written: {error}")


def refuse_foreign(bundle: Path) -> None:
    """See that a bundle may be written to a folder, which then holds nothing else.

    Raises:
        ConfigError: There is something that is no bundle, and would be lost.
    """
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
    """Keep the bundle that is about to be replaced, beside it: ``NAME.VERSION``.

    The one that is served stays where it is; files are shared, not copied, where that can be.
    Of a link it is the bundle that it leads to, and that one's name.

    Returns:
        Where it is kept; None where there is none.

    Raises:
        BundleError: The folder beside cannot be written.
    """
    place = bundle.resolve()
    version = newest_version(place)
    if version is None:
        return None
    kept = place.with_name(f"{place.name}.{version}")
    if kept.exists():
        return kept
    part = part_of(kept)
    try:
        if part.exists():  # of a run that was killed here
            shutil.rmtree(part)
        _link_tree(place, part)
        publish(part, kept)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BundleError(f"{bundle}: the bundle there cannot be kept: {error}") from error
    return kept


def _listed(file: Path) -> bool:
    skipped = file.with_name(_SKIPPED)
    return file in {skipped, part_of(skipped)}


def _link_tree(source: Path, target: Path) -> None:
    """The same files under another name: nobody changes them in place."""
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target
