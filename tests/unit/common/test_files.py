"""Digests of files, and files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from common.files import file_digest, part_of, publish, write_whole
from tests.support.processes import limited_to


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """As hashlib has it of the bytes, also over more than one block and more than one file."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(os.urandom((1 << 20) + 7))
    second.write_bytes(b"b")
    assert file_digest(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    both = first.read_bytes() + second.read_bytes()
    assert file_digest(first, second) == hashlib.sha256(both).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")


def test_a_file_is_the_new_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails before the end leaves what was there, and nothing beside it."""
    path = tmp_path / "folder" / "file"
    write_whole(path, b"old")
    assert path.read_bytes() == b"old"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with limited_to(10), pytest.raises(OSError, match=r"too large: '.*/named'"):
        write_whole(tmp_path / "named", bytes(20))
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_written_anew(tmp_path: Path) -> None:
    """A longer part of a killed process leaves nothing in the next file."""
    path = tmp_path / "file"
    part_of(path).write_bytes(b"half of something long")
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_takes_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    part = part_of(path)
    assert part.name.startswith(".")
    part.write_bytes(b"new")
    publish(part, path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
