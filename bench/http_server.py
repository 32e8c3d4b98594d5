"""Requests per second and latency of ``POST /v1/tag`` with the demo's bundle.

The server is `flask_server.py` with the demo's config and real workers; clients are threads of
this process, each with one connection that it keeps. A text alone, and a picture from the demo's
online posts uploaded as a form; one client for the latency, several for the throughput.

Run: ``python bench/http_server.py [--requests 200] [--clients 8]``; needs the demo (`make demo`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

import requests
from results_file import write_results

from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config" / "demo.yaml"
MEDIA = ROOT / "workshop" / "demo" / "posts" / "online" / "media"
_WARM_UP = 20

Ask = Callable[[requests.Session, int], requests.Response]


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Return the server, ready."""
    command = [sys.executable, "flask_server.py", "--config", str(CONFIG), "--port", str(port)]
    command += ["--set", f"fetch.spool={folder / 'spool'}", "--set", "log.level=warning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        try:
            url = f"http://127.0.0.1:{port}/readyz?only=workers"
            if requests.get(url, timeout=10).status_code == 200:
                return process
        except requests.ConnectionError:
            pass
        time.sleep(0.2)
    process.kill()
    raise SystemExit("the server did not become ready")


def measure(name: str, ask: Ask, clients: int, number: int) -> dict[str, Any]:
    """Send the requests from all clients at once, after a warm-up."""
    turns = itertools.count()

    def client(share: int) -> list[float]:
        with requests.Session() as session:
            took: list[float] = []
            for _ in range(share):
                started = time.perf_counter()
                answer = ask(session, next(turns))
                took.append(time.perf_counter() - started)
                answer.raise_for_status()
            return took

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, [max(1, _WARM_UP // clients)] * clients))
        began = time.perf_counter()
        shares = list(threads.map(client, [max(1, number // clients)] * clients))
        seconds = time.perf_counter() - began
    took_ms = sorted(1000 * s for share in shares for s in share)
    result = {
        "case": name,
        "clients": clients,
        "requests": len(took_ms),
        "requests_per_s": round(len(took_ms) / seconds, 1),
        "latency_ms": {
            "median": round(statistics.median(took_ms), 1),
            "p95": round(took_ms[int(0.95 * (len(took_ms) - 1))], 1),
            "worst": round(took_ms[-1], 1),
        },
    }
    print(f"{name:8} {clients:3} clients  {result['requests_per_s']:8} /s  {result['latency_ms']}")
    return result


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="for each case")
    parser.add_argument("--clients", type=int, default=8, help="for the throughput")
    options = parser.parse_args()
    pictures = [path.read_bytes() for path in sorted(MEDIA.glob("*.jpg"))[:50]]
    if not pictures:
        raise SystemExit("no demo yet: make demo")
    with tempfile.TemporaryDirectory(prefix="insighttag-http-") as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}/v1/tag"

        def text(session: requests.Session, turn: int) -> requests.Response:
            return session.post(url, json={"text": f"a day at the beach {turn}"}, timeout=60)

        def picture(session: requests.Session, turn: int) -> requests.Response:
            files = {"images": ("a.jpg", pictures[turn % len(pictures)])}
            return session.post(url, files=files, timeout=60)

        server = start(Path(folder), port)
        try:
            results = [
                measure(name, ask, clients, options.requests)
                for name, ask in (("text", text), ("picture", picture))
                for clients in (1, options.clients)
            ]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    write_results("http", 1, results)


if __name__ == "__main__":
    main()
