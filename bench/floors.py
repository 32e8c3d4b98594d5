"""Hold the results of a benchmark against ``bench/floors.yaml``: what is below a floor fails.

A floor names rows by some of their keys, a figure in them by its dotted path, and the least or the
most that it may be::

    overhead:
      - {where: {system: daemon, broker: redis}, figure: cpu_ms.king, most: 3}
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from results_file import FOLDER, write_results

FILE = Path(__file__).with_name("floors.yaml")


def broken_floors(
    rows: Sequence[Mapping[str, Any]], floors: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a phrase for each figure that is below its floor."""
    broken = []
    for floor in floors:
        where, path = floor.get("where", {}), floor["figure"]
        for row in rows:
            if any(row.get(key) != value for key, value in where.items()):
                continue
            value: Any = row
            for key in path.split("."):
                value = value.get(key) if value is not None else None
            name = " ".join([path, *map(str, where.values())])
            if value is None:
                broken.append(f"{name} was not measured")
                continue
            if value < floor.get("least", value):
                broken.append(f"{name} is {value:g}, at least {floor['least']:g} is wanted")
            if value > floor.get("most", value):
                broken.append(f"{name} is {value:g}, at most {floor['most']:g} is wanted")
    return broken


def finish(
    name: str,
    runs: int,
    rows: Sequence[Mapping[str, Any]],
    folder: Path = FOLDER,
    *,
    check: bool = True,
) -> int:
    """Write a benchmark's rows and hold them against its floors; gives the exit code.

    Args:
        name: Of the benchmark.
        runs: Rounds.
        rows: Its results.
        folder: Of the file.
        check: False for small runs, which say nothing of speed.
    """
    print(f"written: {write_results(name, runs, list(rows), folder)}")
    floors = yaml.safe_load(FILE.read_text(encoding="utf-8")).get(name, []) if check else []
    broken = broken_floors(rows, floors)
    if broken:
        print(f"{name}: {'; '.join(broken)} ({FILE.name})", file=sys.stderr)
    return 1 if broken else 0
