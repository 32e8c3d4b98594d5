"""Rules that only a process of its own can show: its command line, log, neighbours and memory."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from king.jobs import is_dead, own_name
from tests.support.processes import python, ran


def test_typed_passwords_are_hidden_from_other_users() -> None:
    """The command line that they see has stars in their place."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from config.load import load_settings\n"
        "load_settings(None, sys.argv[2:])\n"
        "print(Path('/proc/self/cmdline').read_text())\n"
    )
    words = ["--set", "broker.url=amqp://u:secret1@h", "store.url=mongodb://u:secret2@h"]
    shown = python("-c", program, *words, check=True).stdout
    assert "amqp://u:***@h" in shown
    assert "secret" not in shown


@pytest.mark.parametrize("way", ["full", "closed"])
def test_a_log_that_takes_no_lines_ends_nothing(way: str) -> None:
    """A line without a place is lost; the program goes on, and ends with its own exit code."""
    program = (
        "import structlog, sys\n"
        "from common.cli import complain\n"
        "from common.logs import configure_logs\n"
        "configure_logs('auto')\n"
        "for _ in range(3): structlog.get_logger().error('x' * 10_000)\n"
        "print('alive', complain('king', 'no', 2))\n"
    )
    # Every write to /dev/full fails with ENOSPC.
    shell = f'exec "$0" -c "$1" 2>{"/dev/full" if way == "full" else "&-"}'
    done = ran("sh", "-c", shell, sys.executable, program)
    assert (done.stdout, done.returncode) == ("alive 2\n", 0)


MONITOR = (
    "scripts/mongo_supervisor/check.py",
    *("--set", "store.url=mongodb://127.0.0.1:1/", "--set", "broker.url=redis://127.0.0.1:1/0"),
)


@pytest.mark.parametrize(
    ("redirection", "failed"),
    [(">&-", False), ("<&- >&- 2>&-", False), ("| true", True), (">/dev/full", True)],
)
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("-m", "scripts.cli", "status", "--json", *MONITOR[1:]), 1),
        (("train_net.py", "--help"), 0),
        (MONITOR, 2),
    ],
    ids=["command", "help", "monitor"],
)
def test_output_that_nobody_takes_is_no_traceback(
    command: tuple[str, ...], code: int, redirection: str, failed: bool
) -> None:
    """Without a standard output there is nothing to fail; what cannot be written costs a 1."""
    line = f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"'
    ended = ran("bash", "-c", line, "-", sys.executable, *command)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr
    assert ended.returncode == (1 if failed else code), ended.stderr


def test_closed_standard_streams_are_not_given_to_files(tmp_path: Path) -> None:
    """The next file that is opened would be written into by whoever prints."""
    program = (
        "import os, subprocess, sys\n"
        "from common.cli import exit_code\n"
        "def run():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        print('printed', flush=True)\n"
        "        sys.stderr.write('complained')\n"
        "        subprocess.run(['sh', '-c', 'echo told; echo told >&2'], check=True)\n"
        "        file.write(str(file.fileno() > 2))\n"
        "sys.exit(exit_code('x', run))\n"
    )
    file = tmp_path / "file"
    words = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, program, str(file)]
    assert subprocess.run(words, check=False, timeout=120).returncode == 0
    assert file.read_text() == "True"


def test_kings_know_who_is_dead() -> None:
    """A neighbour that has ended is dead; one that lives, or lives elsewhere, is not."""
    code = "from king.jobs import own_name; print(own_name(), flush=True); input()"
    child: Any = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    name = child.stdout.readline().strip()
    assert name != own_name()
    assert not is_dead(name)
    assert not is_dead(own_name())
    child.kill()
    end = time.monotonic() + 60
    while not is_dead(name):  # a zombie, not reaped yet, is dead too
        assert time.monotonic() < end
        time.sleep(0.01)
    child.communicate()
    assert is_dead(name)
    host, namespace, pid, identity = own_name().split(":")
    boot, _, ticks = identity.rpartition("-")
    assert is_dead(
        f"{host}:{namespace}:{pid}:{boot}-{int(ticks) - 5}"
    )  # the ID was given out again
    assert not is_dead(f"elsewhere:{namespace}:{pid}:1")
    assert not is_dead(f"{host}:1:{pid}:1")
    for junk in ("", "k1", "a:b:c", f"{host}:{namespace}:x:1", f"{host}:{namespace}:999999999:1:2"):
        assert not is_dead(junk)


@pytest.mark.parametrize("step_s", [-7200, 7200])
def test_a_set_clock_makes_no_king_dead(monkeypatch: pytest.MonkeyPatch, step_s: int) -> None:
    """Its name outlives the step: start times as dates, and the date itself, move along."""
    name, created, now = own_name(), psutil.Process.create_time, time.time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + step_s)
    monkeypatch.setattr(time, "time", lambda: now() + step_s)
    assert not is_dead(name)
    assert own_name() == name


LIMITED = """
import mmap
import numpy as np
from workers.roles.batched import limit_memory
limit_memory(64)
shared = mmap.mmap(-1, 256 << 20)  # the slots are shared, and do not count
small = np.ones(16 << 20, np.uint8)
try:
    np.ones(128 << 20, np.uint8)
except MemoryError:
    print("limited")
"""


def test_memory_limit_counts_private_growth() -> None:
    """Past the limit an allocation fails in the decoder alone; shared slots do not count."""
    assert python("-c", LIMITED, check=True).stdout == "limited\n"
