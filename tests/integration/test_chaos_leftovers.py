"""The chaos run counts its own shared memory as left behind, never another program's."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_rig.leftovers import Watch

SHM = Path("/dev/shm")
HOLD = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    view = mmap.mmap(file.fileno(), 4096)
    print("held", flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="needs /dev/shm")


@pytest.fixture
def names() -> Iterator[tuple[Path, Path]]:
    """Two files in /dev/shm that do not exist yet."""
    mark = uuid.uuid4().hex
    ours, foreign = SHM / f"insighttag-test-{mark}-ours", SHM / f"insighttag-test-{mark}-foreign"
    yield ours, foreign
    ours.unlink(missing_ok=True)
    foreign.unlink(missing_ok=True)


def test_a_killed_process_leaves_its_file_and_a_foreign_file_is_not_counted(
    names: tuple[Path, Path],
) -> None:
    ours, foreign = names
    watch = Watch()
    child: Any = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ours)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"held\n"
        foreign.write_bytes(b"of another program, which was killed")
        watch.look()
    finally:
        child.kill()
        child.communicate()
    assert _files(watch) == [str(ours)]
    ours.unlink()
    assert _files(watch) == []


def _files(watch: Watch) -> list[str]:
    """Return the leftovers in /dev/shm; other tests of this process may hold arenas."""
    return [name for name in watch.segments() if name.startswith("/")]
