"""kill -9 of every script at random moments, run again, and compared with a run left alone.

Outputs must be equal byte for byte; nothing that was finished at a kill may be asked for or made
again. The moments are drawn by the seed: for downloads and extractions by how much is done, for
the short scripts by the time that the undisturbed run took.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from walk_rig.platform import Platform

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.004
_PATIENCE_S = 900.0
_OWN = frozenset({".state", ".lock", ".extract.part"})
"""Of a script's own state, which is no result."""


@dataclass(frozen=True)
class Case:
    """One script.

    Attributes:
        arguments: Of it, given the folder for its results.
        results: What it writes, relative to that folder.
        done: How many things are finished, given the folder; None: moments are drawn by time.
        finished: Thing -> its state, given the folder: what may not be made again.
    """

    name: str
    script: str
    arguments: Callable[[Path], Sequence[str]]
    done: Callable[[Path], int] | None = None
    finished: Callable[[Path], Mapping[str, Any]] | None = None
    asked: Callable[[float], Counter[str]] | None = None


@dataclass
class Row:
    """The outcome of a case."""

    script: str
    seconds: float
    kills: int = 0
    at: list[str] = field(default_factory=list)
    equal: bool = False
    different: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


def kill_all(
    world: Platform, kills: int, seed: int, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run every case; a row for each: ``{script, seconds, kills, at, equal, repeated}``.

    Args:
        world: What the scripts read.
        kills: Of each script.
        seed: Of the moments.
        only: Names of cases; those that others read the output of must be among them.
    """
    chance = random.Random(seed)
    clean, hurt = world.folder / "clean", world.folder / "hurt"
    rows = []
    for case in cases(world, clean):
        if only and case.name not in only:
            continue
        row = run_case(case, clean, hurt, kills, chance)
        rows.append({**vars(row), "repeated": len(row.repeated), "seconds": round(row.seconds, 1)})
        print(
            f"{row.script:<24} {row.kills} kills at {', '.join(row.at):<24} "
            f"equal {'yes' if row.equal else 'NO'}  repeated {len(row.repeated)}"
            f"{'  ' + ' '.join(row.different[:4]) if row.different else ''}",
            flush=True,
        )
    return rows


def cases(world: Platform, clean: Path) -> list[Case]:
    """Return the scripts in order; each reads the files that undisturbed ones have written."""
    settings, media = ("--config", str(world.settings)), clean / "media"
    origin = world.site.folder

    def extract(kind: str) -> Case:
        return Case(
            f"extract {kind}",
            f"scripts/extract_{kind}_features.py",
            lambda out: [
                *settings,
                "--manifest",
                str(media / "manifest.jsonl"),
                "--features",
                str(out / "features"),
            ],
            done=lambda out: len(_made(out, kind)),
            finished=lambda out: _made(out, kind),
        )

    return [
        Case(
            "pull",
            "scripts/data_scripts/pull_posts.py",
            lambda out: [*settings, "--page", "7", "--out", str(out / "posts.jsonl")],
        ),
        Case(
            "download",
            "scripts/data_scripts/download_mp.py",
            lambda out: [
                str(clean / "posts.jsonl"),
                "--out",
                str(out / "media"),
                *settings,
                "--retries",
                "1",
                "--backoff",
                "0.1",
                "--connections",
                "4",
            ],
            done=lambda out: len(_downloaded(out, origin)),
            finished=lambda out: _downloaded(out, origin),
            asked=lambda since: Counter(world.site.requests(since)),
        ),
        Case(
            "analyze",
            "scripts/data_scripts/analyze_posts.py",
            lambda out: [
                str(media / "posts.jsonl"),
                "--media",
                str(media),
                "--out",
                str(out / "analysis"),
                "--labels",
                str(ROOT / "config/idx2name_cls24.json"),
            ],
        ),
        *(extract(kind) for kind in ("text", "image", "audio", "video")),
        Case(
            "build",
            "scripts/build_trainval_data.py",
            lambda out: [
                "--input",
                str(out / "media" / "posts.jsonl"),
                "--features",
                str(out / "features"),
                "--labels",
                str(ROOT / "config/idx2name_cls24.json"),
                "--unknown",
                "skip_post",
                "--out",
                str(out / "data"),
            ],
        ),
    ]


def run_case(case: Case, clean: Path, hurt: Path, kills: int, chance: random.Random) -> Row:
    """Run a script undisturbed, then killed and run again, and compare."""
    clean.mkdir(exist_ok=True)
    hurt.mkdir(exist_ok=True)
    before = _count(case, clean)
    row = Row(case.script.rpartition("/")[2], _whole(case, clean))
    total = _count(case, clean) - before
    if case.done is not None and total > kills:
        moments = sorted(chance.sample(range(1, total), kills))
        for moment in moments:
            _kill_at(case, hurt, row, chance, progress=before + moment)
    else:
        for share in sorted(chance.uniform(0.1, 0.9) for _ in range(kills)):
            _kill_in_time(case, hurt, row, chance, share * row.seconds)
    _finish(case, hurt, row)
    expected, files = tree(clean), tree(hurt)
    row.different = sorted(
        name for name in expected.keys() | files.keys() if expected.get(name) != files.get(name)
    )
    row.equal = not row.different
    return row


def tree(folder: Path) -> dict[str, str]:
    """Return sha256 of every file of the results by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_own(path.relative_to(folder))
    }


def _is_own(path: Path) -> bool:
    return any(part in _OWN or part.endswith(".lock") for part in path.parts)


def _start(case: Case, out: Path) -> subprocess.Popen[bytes]:
    log = (out.parent / f"{out.name}.log").open("ab")
    with log:
        return subprocess.Popen(
            [sys.executable, case.script, *case.arguments(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _whole(case: Case, out: Path) -> float:
    """Run to the end; gives the seconds."""
    started = time.monotonic()
    child = _start(case, out)
    code = child.wait(_PATIENCE_S)
    if code:
        log = (out.parent / f"{out.name}.log").read_text(errors="replace")
        raise SystemExit(f"{case.script}: exit {code}\n{log[-3000:]}")
    return time.monotonic() - started


def _kill_at(
    case: Case,
    out: Path,
    row: Row,
    chance: random.Random,
    *,
    progress: int | None = None,
    after_s: float = 0.0,
) -> None:
    """Run and kill: the script alone, or with all that it has started."""
    watch, started = _Watch(case, out), time.monotonic()
    child = _start(case, out)
    while child.poll() is None:
        here = time.monotonic() - started
        if here >= after_s if progress is None else _count(case, out) >= progress:
            break
        time.sleep(_POLL_S)
    if child.poll() is None:
        if chance.random() < 0.5:
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
        row.kills += 1
        row.at.append(f"{after_s:.1f} s" if progress is None else f"{progress} done")
    row.repeated += watch.repeated()


def _kill_in_time(case: Case, out: Path, row: Row, chance: random.Random, after_s: float) -> None:
    """Kill after a time, or sooner where the script was done by then."""
    before = row.kills
    for _ in range(5):
        _kill_at(case, out, row, chance, after_s=after_s)
        if row.kills > before:
            return
        after_s *= 0.6


def _finish(case: Case, out: Path, row: Row) -> None:
    watch = _Watch(case, out)
    _whole(case, out)
    row.repeated += watch.repeated()


class _Watch:
    """The things finished before a run, and those that the run has made or asked for again."""

    def __init__(self, case: Case, out: Path) -> None:
        self._case, self._out = case, out
        self._since = time.monotonic()
        self._before = dict(case.finished(out)) if case.finished is not None else {}

    def repeated(self) -> list[str]:
        """Return the names of things that were done again."""
        if self._case.asked is not None:
            asked = self._case.asked(self._since)
            return [name for name in self._before if asked[name]]
        if self._case.finished is None:
            return []
        now = self._case.finished(self._out)
        return [name for name, state in self._before.items() if now.get(name) != state]


def _count(case: Case, out: Path) -> int:
    return case.done(out) if case.done is not None else 0


def _made(out: Path, kind: str) -> dict[str, tuple[int, int]]:
    """Return when and where each feature file that holds a modality was written."""
    from common.errors import FeatureError
    from extractors.feature_file import read_header

    written = {}
    for path in (out / "features").glob("*/*.safetensors"):
        try:
            header = read_header(path, path.stem)
            status = path.stat()
        except (FeatureError, OSError):
            continue
        if kind in header.statuses:
            written[path.name] = (status.st_mtime_ns, status.st_ino)
    return written


_names: dict[Path, dict[str, str]] = {}


def _downloaded(out: Path, origin: Path) -> dict[str, str]:
    """Return paths on the server whose content is in its place, without those that share it."""
    if origin not in _names:
        hashes: dict[str, list[str]] = {}
        for path in sorted(origin.rglob("*")):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                hashes.setdefault(digest, []).append(str(path.relative_to(origin)))
        _names[origin] = {d: names[0] for d, names in hashes.items() if len(names) == 1}
    known = _names[origin]
    digests = (path.stem for path in (out / "media" / "media").glob("*/*"))
    return {known[digest]: digest for digest in digests if digest in known}
