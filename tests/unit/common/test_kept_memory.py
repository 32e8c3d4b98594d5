"""Memory that was freed is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ROUNDS = """
import resource
from common.processes import keep_freed_memory
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def task():
    first, second = bytearray(12 << 20), bytearray(20 << 20)
task()
before = faults()
task()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(("call", "new_pages"), [("", True), ("keep_freed_memory()", False)])
def test_a_second_task_takes_no_new_pages(call: str, new_pages: bool) -> None:
    command = [sys.executable, "-c", _ROUNDS.format(call=call)]
    faults = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603
    assert (faults > 1000) is new_pages
