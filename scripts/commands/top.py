"""``insighttag top``: the queue, the King and its workers, redrawn every second.

The King's health file is read at each look; broker and database, whose answers may take seconds,
are asked less often. Starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from common.cli import flag, option, say
from common.errors import TaggingError
from common.logs import visible
from common.times import plain
from config.settings import Settings
from corpus.runs import Stopper
from scripts.commands.common import AsJson, Config, Overrides, ago, duration, settings_of
from scripts.commands.status import collect, king_health

# At half, numbers change faster than one reads them; at double, a burst is over before it shows.
_TERMINAL_EVERY_S = 1.0
# As everywhere without a terminal (`common.progress`).
_LINE_EVERY_S = 30.0
# Between two questions to broker and database: at half, a screen left open all day costs them
# connections for nothing; at double, the queue seems to stand still.
_ASK_EVERY_S = 5.0
_FAILURES = 5

# Rates and CPU are measured between two looks. At half, one batch more or less doubles a rate; at
# double, a script that asks often waits for nothing.
_ONCE_AFTER_S = 0.5
_GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total")
_GPU_WAIT_S = 2.0
_MIB = 1 << 20


@dataclass
class Looks:
    """Values kept from one look to the next: processes, counts, and slow answers."""

    settings: Callable[[], Settings]
    asked: Settings
    clock: Callable[[], float] = time.monotonic
    _processes: dict[int, psutil.Process] = field(default_factory=dict)
    _done: dict[str, tuple[float, int]] = field(default_factory=dict)
    _services: dict[str, Any] = field(default_factory=dict)
    _asked_at: float = float("-inf")

    def look(self) -> dict[str, Any]:
        """Return everything that ``--json`` prints."""
        now = self.clock()
        if now - self._asked_at >= _ASK_EVERY_S:
            settings = self.settings()
            answers = collect(self.asked, settings)
            self._services = {
                "queue": answers["queue"],
                "store": answers["store"],
                "failures": _failures(settings, answers["store"]["error"]),
            }
            self._asked_at = self.clock()
        king = king_health(self.asked)
        alive = king is not None and king["alive"]
        workers = [self._worker(each, now) for each in king["workers"]] if king and alive else []
        return {
            "at": time.time(),
            **self._services,
            "king": king,
            "stages": _stages(workers),
            "workers": workers,
            "machine": {
                "cpu_percent": psutil.cpu_percent(),
                "cores": psutil.cpu_count() or 1,
                "memory_percent": psutil.virtual_memory().percent,
                "gpus": gpus(),
            },
        }

    def _worker(self, worker: Mapping[str, Any], now: float) -> dict[str, Any]:
        """Return a worker with its rate, CPU and memory since the look before."""
        name, done = worker["name"], int(worker["done"])
        before_s, before = self._done.get(name, (now, done))
        rate_hz = max(0, done - before) / (now - before_s) if now > before_s else 0.0
        self._done[name] = (now, done)
        cpu, memory = 0.0, 0
        with contextlib.suppress(psutil.Error, OSError):  # it has ended
            pid = worker["pid"]
            if pid is not None:
                process = self._processes.setdefault(pid, psutil.Process(pid))
                cpu, memory = process.cpu_percent(), process.memory_info().rss
        about = {"tasks_per_s": round(rate_hz, 2), "cpu_percent": cpu, "memory_bytes": memory}
        return {**worker, **about}


def top(
    once: Annotated[bool, flag("--once", "Look once and exit.")] = False,
    every: Annotated[
        float | None, option("Seconds between two looks; 1, or 30 in a file.", "S", min=0.1)
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Watch the queue, the King, its workers, and the last failures.

    Ends with Ctrl-C. Without a terminal it prints a line every 30 s, with --json a line of JSON.
    """
    from deploy import embedded

    asked = settings_of(config, overrides)
    looks = Looks(lambda: embedded.peek(asked), asked)
    terminal = sys.stdout.isatty() and not as_json
    every_s = every or (_TERMINAL_EVERY_S if terminal else _LINE_EVERY_S)
    if once:
        with Stopper() as stopper:
            looks.look()
            stopper.wait(_ONCE_AFTER_S)
        _tell(looks.look(), as_json=as_json, whole=True)
        return
    if not terminal:
        with Stopper() as stopper:
            while not stopper.asked:
                _tell(looks.look(), as_json=as_json, whole=False)
                stopper.wait(every_s)
        return
    with Stopper() as stopper, Live(screen=True, auto_refresh=False) as live:
        while not stopper.asked:
            live.update(screen(looks.look()), refresh=True)
            stopper.wait(every_s)


def _tell(look: Mapping[str, Any], *, as_json: bool, whole: bool) -> None:
    if as_json:
        say(json.dumps(look, ensure_ascii=False, default=plain) + "\n")
    elif whole:
        Console(width=None if sys.stdout.isatty() else 100, highlight=False).print(screen(look))
    else:
        say(line(look) + "\n")
    sys.stdout.flush()


def _failures(settings: Settings, down: str | None) -> list[dict[str, Any]]:
    """Return the newest dead letters."""
    from king.store.queries import open_queries

    if down is not None:
        return []
    try:
        with open_queries(settings.store) as queries:
            jobs = queries.dead_letters(limit=_FAILURES)
    except TaggingError:
        return []
    return [
        {"post_id": job.post_id, "at": job.updated_at, **(job.last_error or {})} for job in jobs
    ]


def _stages(workers: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return tasks in flight, rate and CPU of each role."""
    stages: dict[str, dict[str, float]] = {}
    for worker in workers:
        of = stages.setdefault(
            worker["role"], {"workers": 0, "in_flight": 0, "tasks_per_s": 0.0, "cpu_percent": 0.0}
        )
        of["workers"] += 1
        of["in_flight"] += worker["held"]
        of["tasks_per_s"] = round(of["tasks_per_s"] + worker["tasks_per_s"], 2)
        of["cpu_percent"] = round(of["cpu_percent"] + worker["cpu_percent"], 1)
    return stages


def gpus() -> list[dict[str, float]]:
    """Return load and memory of each NVIDIA GPU; nothing if nvidia-smi is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 -- words of ours alone
            command, capture_output=True, text=True, timeout=_GPU_WAIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return read_gpus(done.stdout)


def read_gpus(text: str) -> list[dict[str, float]]:
    """Read lines of nvidia-smi, ``0, 87, 1024, 143771``; fields without a number are left out."""
    gpus_read = []
    for row in text.splitlines():
        values = {}
        for name, cell in zip(
            ("index", "percent", "used_mib", "total_mib"), row.split(","), strict=False
        ):
            with contextlib.suppress(ValueError):  # [N/A]
                values[name] = float(cell)
        if values:
            gpus_read.append(values)
    return gpus_read


def line(look: Mapping[str, Any]) -> str:
    """Return a look as one line."""
    king, queue = look["king"], look["queue"]
    parts = [time.strftime("%H:%M:%S", time.localtime(look["at"])), _queue(queue)]
    if king is not None and king["alive"]:
        stages = " ".join(f"{role} {of['in_flight']:.0f}" for role, of in look["stages"].items())
        parts += [
            f"{king['phase']}, {king['posts_per_s']} posts/s, {king['in_flight']} in flight",
            stages,
            f"{king['counters']['tagged']:,} tagged, {king['counters']['failed']:,} failed",
        ]
    else:
        parts.append(_king(king))
    parts += [f"CPU {look['machine']['cpu_percent']:.0f}%"]
    parts += [_gpu(each) for each in look["machine"]["gpus"]]
    return "; ".join(part for part in parts if part)


def screen(look: Mapping[str, Any]) -> Group:
    """Return a look as it is drawn."""
    king, machine = look["king"], look["machine"]
    alive = king is not None and king["alive"]
    head = Table.grid(padding=(0, 2))
    head.add_row("queue", Text(visible(_queue(look["queue"]))))
    store = look["store"]
    counts = store["counts"]
    told = store["error"] or ", ".join(
        f"{counts[k]:,} {k}" for k in ("posts", "tagged", "untagged")
    )
    head.add_row("database", Text(visible(told)))
    head.add_row("king", Text(visible(_king(king)), style="" if alive else "yellow"))
    load = f"CPU {machine['cpu_percent']:.0f}% of {machine['cores']} cores, "
    load += f"memory {machine['memory_percent']:.0f}%"
    head.add_row("machine", Text("; ".join([load, *map(_gpu, machine["gpus"])])))
    parts: list[Any] = [Panel(head, title="insighttag", title_align="left")]
    if look["workers"]:
        parts += [_stage_table(look["stages"]), _worker_table(look["workers"])]
    if look["failures"]:
        parts.append(_failure_table(look["failures"], look["at"]))
    return Group(*parts)


def _queue(queue: Mapping[str, Any]) -> str:
    if queue["error"] is not None:
        return f"{queue['name']}: {queue['error']}"
    in_hand = queue["unacknowledged"]
    return f"{queue['depth']:,} waiting" + (
        f", {in_hand:,} unacknowledged" if in_hand is not None else ""
    )


def _king(king: Mapping[str, Any] | None) -> str:
    if king is None:
        return "not running"
    if not king["alive"]:
        return f"not running (pid {king['pid']} was last seen {duration(king['age_s'])} ago)"
    bundle = king.get("bundle") or {}
    serving = f", bundle {bundle['name']} {bundle['version']}" if bundle else ""
    oldest = king.get("oldest_in_flight_s") or 0.0
    return (
        f"{king['phase']}: {king['posts_per_s']} posts/s, {king['in_flight']} in flight "
        f"(oldest {oldest:.1f} s){serving}"
    )


def _gpu(gpu: Mapping[str, float]) -> str:
    load = f"{gpu['percent']:.0f}%" if "percent" in gpu else "?"
    used, total = gpu.get("used_mib"), gpu.get("total_mib")
    memory = f", {used / 1024:.1f} of {total / 1024:.1f} GiB" if used and total else ""
    return f"GPU {gpu.get('index', 0):.0f} {load}{memory}"


def _table(columns: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return table


def _stage_table(stages: Mapping[str, Mapping[str, float]]) -> Table:
    columns = ("stage", "workers", "in flight", "tasks/s", "CPU")
    table = _table(columns, columns[1:])
    for role, of in stages.items():
        numbers = (f"{of['workers']:.0f}", f"{of['in_flight']:.0f}", f"{of['tasks_per_s']:.1f}")
        table.add_row(role, *numbers, f"{of['cpu_percent']:.0f}%")
    return table


def _worker_table(workers: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("worker", "device", "state", "pid", "in flight", "done", "deaths", "CPU", "MiB")
    table = _table(columns, columns[3:])
    for each in workers:
        table.add_row(
            each["name"],
            each["device"],
            Text(each["state"], style="" if each["state"] == "ready" else "yellow"),
            *(str(each[key] if each[key] is not None else "") for key in ("pid", "held")),
            f"{each['done']:,}",
            Text(str(each["deaths"]), style="red" if each["deaths"] else ""),
            f"{each['cpu_percent']:.0f}%",
            f"{each['memory_bytes'] / _MIB:,.0f}",
        )
    return table


def _failure_table(failures: Sequence[Mapping[str, Any]], now_s: float) -> Table:
    """Return dead letters; IDs and reasons may be long, and share the rest of the width."""
    table = Table(box=None, pad_edge=False, expand=True)
    for column, ratio in (("last failures", None), ("stage", None), ("post", 2), ("reason", 3)):
        table.add_column(column, no_wrap=True, overflow="ellipsis", ratio=ratio)
    for each in failures:
        reason = f"{each.get('type', '')}: {each.get('message', '')}"
        cells = (ago(each["at"], now_s), each.get("stage", ""), each["post_id"], reason)
        table.add_row(*(Text(visible(str(cell))) for cell in cells))
    return table
