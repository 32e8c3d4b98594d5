"""Kill everything, again and again, while posts are tagged; then count what went wrong.

On a real RabbitMQ, and again on a real Redis, the real daemon (``online_process.py`` and its
watchdog under supervisord with the shipped configuration, small models with random weights) tags
posts with real media. Everything is on loopback, in one temporary folder, and bounded in time.
A seeded schedule kills workers of every role and the King (also right after a result was written
and before its message is acknowledged, and while the database is away), sends it SIGTERM under
load, restarts broker and database, cuts and blackholes connections, fills and removes the
spool, and stops workers with SIGSTOP. The database refuses writes with the codes of a server in
trouble; the broker takes no messages (memory alarm, maxmemory, a full queue) and brings some that
cannot be read; the daemon's clock steps by hours. Each post is published one to three times.

What is counted, per broker:
  lost              posts that are neither tagged nor a dead letter at the end
  tagged_twice      posts whose result changed after they had been tagged by the same bundle, by a
                    trigger inside the database that no writer can get past (`chaos_rig.audit`),
                    or that the daemon's log reports as tagged more than once
  tagged_in_part    posts whose tags lack media that may be had now
  dead_lettered     posts that are dead letters; one post in a hundred has nothing but junk
  king_exit_2       ends of a King with exit code 2, which supervisord takes for a wrong setting
                    and does not follow by a start
  poison_lost       unreadable messages that became no dead letter; poison_messages counts all
  jobs_left         jobs that are no dead letters; messages on the queue count as broken too
  orphan_processes  descendants that live on (this process is the subreaper: none can hide)
  shared_segments   arenas that are still held, files in /dev/shm that the run used and left
  spool_files       what is left under fetch.spool
  recovery_s        from a fault's end until a post that was published after it is tagged; for a
                    killed or stopped worker, until that worker is ready again

Run: ``python bench/chaos.py [--posts 2000] [--brokers rabbitmq,redis] [--seed 1] [--short]``.
Exits 1 when anything is lost, doubled or left behind, or a fault is not recovered from.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from chaos_rig.faults import SHORT, schedule
from chaos_rig.leftovers import become_subreaper
from chaos_rig.run import Plan, Report, Run, Stock
from chaos_rig.site import SERVERS, BrokerName
from results_file import FOLDER, write_results

from common.logs import configure_logs
from common.progress import progress_bar
from common.tables import print_table

_SHORT_MEDIA, _FULL_MEDIA = 8, 100


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--posts", type=int, default=2000)
    parser.add_argument("--brokers", default="rabbitmq,redis", help="which")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument(
        "--short",
        action="store_true",
        help="one fault of each kind, the brokers at once: for the tests",
    )
    parser.add_argument("--together", action="store_true", help="the brokers at once")
    parser.add_argument("--faults", help="these instead, separated by commas")
    parser.add_argument(
        "--limit-s", type=float, default=600, help="by then, after the last fault, all has ended"
    )
    parser.add_argument("--stock", type=Path, help="media and model; made there when missing")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of chaos.json")
    parser.add_argument("--keep", type=Path, help="keep the daemon's logs in this folder")
    return parser.parse_args(arguments)


def kinds_of(options: argparse.Namespace, broker: BrokerName) -> list[str]:
    """Return the faults of a run, in order."""
    if options.faults:
        return [kind.strip() for kind in options.faults.split(",")]
    if options.short:
        return list(SHORT[broker])
    return schedule(broker, options.seed)


def run_one(options: argparse.Namespace, broker: BrokerName, stock: Stock) -> Report:
    """Run one broker."""
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder,
        progress_bar(broker, options.posts) as bar,
    ):
        plan = Plan(
            broker=broker,
            posts=options.posts,
            kinds=kinds_of(options, broker),
            seed=options.seed,
            limit_s=options.limit_s,
            decoders=1 if options.short else 2,
        )
        run = Run(Path(folder), stock, plan, bar.update)
        try:
            return run.run()
        finally:
            if options.keep:
                _keep(Path(folder), options.keep / broker)


def _keep(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for file in (folder / "workshop" / "run").glob("*.log"):
        (to / file.name).write_bytes(file.read_bytes())


def show(report: Report) -> None:
    """Print the faults and the figures."""
    rows = []
    for wound in report.wounds:
        recovery = "never" if wound.recovery_s is None else f"{wound.recovery_s:.1f}"
        rows.append((wound.kind, wound.posts, f"{wound.lasted_s:.1f}", recovery, wound.note))
    title = f"{report.figures['broker']}: {report.seconds:.0f} s"
    columns = ("fault", "at post", "lasted s", "recovery s", "note")
    print_table(title, columns, rows, right=(1, 2, 3))
    for key, value in report.figures.items():
        print(f"  {key:28} {value}")
    print(f"  {'duplicates settled':28} {report.settled}")
    for reason in report.broken:
        print(f"  BROKEN: {reason}")
    sys.stdout.flush()


def _end(_number: int, _frame: object) -> None:
    sys.exit("chaos: ended by a signal")


def main(arguments: list[str] | None = None) -> int:
    """Run all brokers; gives the exit code."""
    options = parse(arguments)
    asked = [name.strip() for name in options.brokers.split(",")]
    brokers = [name for name in SERVERS if name in asked]
    if len(brokers) != len(asked):
        print(f"chaos: --brokers {options.brokers}: take {', '.join(SERVERS)}", file=sys.stderr)
        return 2
    configure_logs("json", "error")
    signal.signal(signal.SIGTERM, _end)  # so that nothing outlives this process
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="chaos-stock-") as folder:
        place = options.stock or Path(folder)
        stock = Stock.at(place, _SHORT_MEDIA if options.short else _FULL_MEDIA)
        if (options.short or options.together) and len(brokers) > 1:
            return run_together(options, brokers, place)
        reports = []
        for broker in brokers:
            reports.append(run_one(options, broker, stock))
            show(reports[-1])
    file = write_results("chaos", 1, [report.figures for report in reports], options.out)
    print(f"written: {file}")
    return 1 if any(report.broken for report in reports) else 0


def run_together(options: argparse.Namespace, brokers: list[BrokerName], stock: Path) -> int:
    """Run the brokers side by side, each in a process of its own; gives the exit code."""
    children = []
    for broker in brokers:
        own = {"brokers": broker, "posts": options.posts, "seed": options.seed, "stock": stock}
        own |= {"limit-s": options.limit_s, "out": stock / broker}
        own |= {"keep": options.keep} if options.keep else {}
        own |= {"faults": options.faults} if options.faults else {}
        arguments = [f"--{name}={value}" for name, value in own.items()]
        arguments += ["--short"] if options.short else []
        command = [sys.executable, __file__, *arguments]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        for child in children:
            print(child.communicate()[0])
    finally:
        for child in children:
            child.terminate()
            child.wait()
    files = [stock / broker / "chaos.json" for broker in brokers]
    results = [entry for f in files if f.exists() for entry in json.loads(f.read_text())["results"]]
    print(f"written: {write_results('chaos', 1, results, options.out)}")
    return 1 if any(child.returncode for child in children) else 0


if __name__ == "__main__":
    sys.exit(main())
