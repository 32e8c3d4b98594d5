"""The walk of docs/data.md: from a database of 1,000 posts, 100 of them broken, to a bundle.

The posts are made with real media, spoilt in the ways of `walk_rig.broken`, served on
loopback, and put into a MongoDB-protocol server. Then every command of docs/data.md runs in its
order. It fails where a command fails, where a broken post is not named with its reason by the
step that should find it, or where one that is not broken is named.

Run: ``python bench/walk.py [--posts 1000] [--kills] [--write_docs]``; needs the backbones of the
demo (``make demo``). ``--kills`` kills each script three times and compares (`walk_rig.kills`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from results_file import FOLDER, write_results
from walk_rig import docs, named
from walk_rig.broken import cut_lines
from walk_rig.kills import kill_all
from walk_rig.platform import Platform, platform

from common.tables import print_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "data.md"
_PULL = "pull_posts.py"
_ENOUGH = 500
_FEW = {
    "--min_posts 20": "--min_posts 20 --base config/idx2name_cls24.json",
    "--min-posts 20": "--min-posts 0",
    "labels.json --data": "labels.json --min-posts 0 --data",
}
"""Options that differ for fewer posts than that: few tags have 20 of them."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--posts", type=int, default=1000)
    parser.add_argument("--broken", type=int, help="posts to break; default: a tenth")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--kills", action="store_true", help="the kill tests instead of the walk")
    parser.add_argument("--runs", type=int, default=3, help="kills of each script")
    parser.add_argument("--only", nargs="+", default=[], help="scripts to kill; default: all")
    parser.add_argument("--write_docs", action="store_true", help="put the output into the page")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--name", help="of the result file; default walk, or walk_kills")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; return 0 when all is as it should be."""
    options = parse(arguments)
    spoilt = options.posts // 10 if options.broken is None else options.broken
    with tempfile.TemporaryDirectory(prefix="insighttag-walk-") as name:
        folder = Path(name)
        with platform(folder, options.posts, spoilt, options.seed) as world:
            print(f"{world.posts} posts, {len(world.plants)} of them broken: {folder}", flush=True)
            if options.kills:
                rows = kill_all(world, options.runs, options.seed, options.only)
                content: dict[str, Any] = {"posts": world.posts, "scripts": rows}
                good = all(row["equal"] and not row["repeated"] and row["kills"] for row in rows)
                content["good"] = good
            else:
                content = walk(world, write_page=options.write_docs)
    file = options.name or ("walk_kills" if options.kills else "walk")
    print(f"written to {write_results(file, 1, content, options.out)}")
    return 0 if content["good"] else 1


def walk(world: Platform, *, write_page: bool) -> dict[str, Any]:
    """Run the commands of the page and judge what they leave."""
    page = PAGE.read_text(encoding="utf-8")
    folder, programs = world.folder, shims(world.folder)
    ran: list[docs.Ran] = []
    cut: Mapping[str, int] = {}
    for command in docs.commands(page):
        if command.startswith("export W="):
            continue
        one = docs.run(fitted(command, world.posts), folder, ROOT, programs)
        ran.append(replace(one, command=command))
        mark = "" if one.code == 0 else f"  exit {one.code}"
        print(f"{one.seconds:7.1f} s  {' '.join(command.split())[:110]}{mark}", flush=True)
        if one.code:
            print(one.output[-3000:])
        if _PULL in command and not cut:
            cut = cut_lines(folder / "posts.jsonl", world.plants)
    if write_page:
        shown = {str(folder): "workshop/corpus", str(ROOT): "."}
        now = PAGE.read_text(encoding="utf-8")  # what was written meanwhile stays
        PAGE.write_text(docs.put_back(now, ran, shown), encoding="utf-8")
    verdicts = named.judge(folder, world.plants, cut)
    table = named.rows(verdicts)
    alarms = named.false_alarms(folder, world.plants, cut)
    show(table)
    for verdict in verdicts:
        if verdict.note is None:
            print(f"not named: {verdict.plant}")
    for note in alarms:
        print(f"named, and not broken: {note}")
    bundle = bundle_of(folder)
    failed = [one.command for one in ran if one.code]
    good = not failed and not alarms and all(v.note for v in verdicts) and bool(bundle)
    return {
        "good": good,
        "posts": world.posts,
        "broken": len(verdicts),
        "named": sum(v.note is not None for v in verdicts),
        "named_and_not_broken": len(alarms),
        "ways": table,
        "bundle": bundle,
        "commands": [
            {
                "command": " ".join(one.command.split()),
                "seconds": round(one.seconds, 1),
                "exit": one.code,
            }
            for one in ran
        ],
    }


def fitted(command: str, posts: int) -> str:
    """Return the command as that many posts need it."""
    for text, other in _FEW.items() if posts < _ENOUGH else ():
        command = command.replace(text, other)
    return command


def shims(folder: Path) -> Path:
    """Return a folder with ``python`` and ``insighttag`` as a user's environment has them."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, line in (
        ("python", f'exec "{sys.executable}" "$@"'),
        ("insighttag", f'exec "{sys.executable}" -m scripts.cli "$@"'),
    ):
        path = programs / name
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="ascii")
        path.chmod(0o755)
    return programs


def bundle_of(folder: Path) -> dict[str, Any]:
    """Return the figures of the bundle; empty where there is none that can be loaded."""
    from common.errors import TaggingError
    from fusion.bundle.bundle import load_bundle

    try:
        bundle = load_bundle(folder / "bundle")
    except TaggingError as error:
        print(f"the bundle: {error}")
        return {}
    metrics = {k: v for k, v in dict(bundle.metrics).items() if isinstance(v, (int, float))}
    return {"name": bundle.name, "labels": len(bundle.labels), "metrics": metrics}


def show(table: Sequence[Mapping[str, Any]]) -> None:
    """Print each planted fault, where it was named, and the reason."""
    columns = ("way", "posts", "named", "step", "file", "reason")
    print_table("", columns, [list(row.values()) for row in table])


if __name__ == "__main__":
    sys.exit(main())
