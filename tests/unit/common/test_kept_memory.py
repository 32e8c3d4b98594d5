"""Memory that was freed is used again."""

import subprocess
import sys

import pytest

_TWO_TASKS = """
import resource
from common.processes import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def task():
    first, second = bytearray(12 << 20), bytearray(20 << 20)
task()
before = faults()
task()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_second_task_takes_no_new_pages() -> None:
    command = [sys.executable, "-c", _TWO_TASKS]
    faults = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults < 1000  # its 32 MiB are 8192 pages
