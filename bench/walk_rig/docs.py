"""The commands of a docs page: read out of it, run as they stand there, their output put back.

A block that begins with a line of three backquotes and ``console`` holds commands behind ``$ ``,
longer ones with a backslash at the line's end, and under each what it writes.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MOST_LINES = 24
_SHOWN = "workshop/corpus"


@dataclass(frozen=True)
class Ran:
    """A command that was run.

    Attributes:
        command: As it stands in the page.
        output: Standard output and standard error as they came.
    """

    command: str
    code: int
    seconds: float
    output: str


def commands(page: str) -> list[str]:
    """Return the commands of a page in their order."""
    return [command for block in _BLOCK.findall(page) for command, _ in _parts(block)]


def run(command: str, folder: Path, root: Path, programs: Path) -> Ran:
    """Run one in bash from the checkout, ``$W`` being the walk's folder."""
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {
        **os.environ,
        "W": str(folder),
        "PATH": path,
        "PYTHONPATH": str(root),
        "COLUMNS": "100",
    }
    started = time.monotonic()
    child = subprocess.run(
        ["bash", "-c", command],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Ran(command, child.returncode, time.monotonic() - started, child.stdout)


def put_back(page: str, ran: Sequence[Ran], shown: Mapping[str, str]) -> str:
    """Return the page with each command's output under it.

    Args:
        page: Text of the page.
        ran: Commands that were run; others keep what stands under them.
        shown: Text that a reader shall not see -> what stands there instead.
    """
    unused = list(ran)

    def output_of(command: str) -> str | None:
        """Return the output of the first unused run: a command may stand in the page twice."""
        first = next((one for one in unused if one.command == command), None)
        if first is not None:
            unused.remove(first)
        return None if first is None else first.output

    def block(match: re.Match[str]) -> str:
        lines: list[str] = []
        for command, before in _parts(match[1]):
            output = output_of(command)
            lines += [f"$ {command}", *(before if output is None else _short(output, shown))]
        return "```console\n" + "\n".join(lines) + "\n```"

    return _BLOCK.sub(block, page)


def _parts(block: str) -> list[tuple[str, list[str]]]:
    """Return the command and the lines under it."""
    parts: list[tuple[str, list[str]]] = []
    goes_on = False
    for line in block.rstrip("\n").split("\n"):
        if goes_on:
            parts[-1] = (f"{parts[-1][0]}\n{line}", [])
            goes_on = line.endswith("\\")
        elif line.startswith("$ "):
            parts.append((line[2:], []))
            goes_on = line.endswith("\\")
        elif parts:
            parts[-1][1].append(line)
    return parts


def _short(output: str, shown: Mapping[str, str]) -> list[str]:
    for secret, text in shown.items():
        output = output.replace(secret, text)
    lines = [line.rstrip()[:150] for line in output.replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line]
    if len(lines) > _MOST_LINES:
        head = _MOST_LINES * 2 // 3
        lines = [*lines[:head], "...", *lines[head - _MOST_LINES + 1 :]]
    return lines
