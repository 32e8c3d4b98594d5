"""Posts with real media: a few are made, many refer to them; a loopback server hands them out."""

from __future__ import annotations

import functools
import http.server
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import QuietFiles
from tests.support.services import DIE_WITH_PARENT

ROOT = Path(__file__).resolve().parents[2]
JUNK = "junk.jpg"
"""A file that is no picture: a post that has nothing else must end as a dead letter."""
FIRST = "post-00000"
"""The ID of the first post; it is on the queue before the first fault."""
_JUNK_SHARE = 0.01
_BURST_SHARE = 0.6


def make_media(folder: Path, posts: int, seed: int) -> None:
    """Make that many demo posts, ``posts.json`` and their media, and one file that is none."""
    script = ROOT / "scripts" / "data_scripts" / "make_demo_posts.py"
    arguments = ["--out", str(folder), "--posts", str(posts), "--seed", str(seed)]
    subprocess.run(
        [sys.executable, str(script), *arguments, "--split", "online"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (folder / JUNK).write_bytes(random.Random(seed).randbytes(2000))


def documents(
    entries: list[dict[str, Any]], number: int, base_url: str, seed: int
) -> list[dict[str, Any]]:
    """Return post documents: text and media of one entry each; one in a hundred is only junk."""
    rng = random.Random(seed)
    made = []
    for i in range(number):
        entry = entries[i % len(entries)]
        post: dict[str, Any] = {"_id": f"post-{i:05d}", "text": entry["text"]}
        for kind in ("images", "videos", "audios"):
            post[kind] = [{"url": f"{base_url}/{path}"} for path in entry[kind]]
        if rng.random() < _JUNK_SHARE:
            post = {"_id": post["_id"], "images": [f"{base_url}/{JUNK}"]}
        made.append(post)
    return made


@contextmanager
def media_server(folder: Path) -> Iterator[str]:
    """Serve the folder in a process of its own; gives the base URL."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from chaos_rig.posts import serve; serve(sys.argv[1])"
    )
    child = subprocess.Popen(
        [
            *(sys.executable, "-S", "-c", DIE_WITH_PARENT),
            *(sys.executable, "-c", code, str(folder), str(ROOT / "bench")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def serve(folder: str) -> None:
    """Serve for ever; says its URL on standard output."""
    handler = functools.partial(QuietFiles, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


@dataclass(frozen=True, slots=True)
class Shipment:
    """The posts that are published in one part of the run.

    Attributes:
        burst: IDs that are on the queue before the fault.
        trickle: IDs that follow from the fault's end on.
        probes: Those of the trickle that were never published before: when one of them is
            tagged, messages flow again from end to end.
    """

    burst: list[str]
    trickle: list[str]
    probes: frozenset[str]


def shipments(ids: list[str], parts: int, rng: random.Random) -> list[Shipment]:
    """Deal posts over the parts; each is published one to three times.

    Copies come at once, or in a later part, when their post has long been tagged.
    """
    bursts: list[list[str]] = [[] for _ in range(parts)]
    trickles: list[list[str]] = [[] for _ in range(parts)]
    probes: list[set[str]] = [set() for _ in range(parts)]
    for i, post_id in enumerate(ids):
        part, place = divmod(i * parts / len(ids), 1)
        own = bursts[int(part)] if place < _BURST_SHARE else trickles[int(part)]
        own.append(post_id)
        if own is trickles[int(part)]:
            probes[int(part)].add(post_id)
        for _ in range(rng.choice((0, 0, 1, 2))):
            later = int(part) + rng.choice((0, 0, 1, 3))
            (bursts[later] if int(part) < later < parts else own).append(post_id)
    for share in (*bursts, *trickles):
        rng.shuffle(share)
    return [
        Shipment(*dealt) for dealt in zip(bursts, trickles, map(frozenset, probes), strict=True)
    ]


class Feeder(threading.Thread):
    """A publisher: `ship` sends at once, `trickle` one by one.

    Attributes:
        published: Messages that the broker has confirmed.
    """

    def __init__(self, publish: Any, *, every_s: float) -> None:
        super().__init__(name="feeder", daemon=True)
        self._publish = publish
        self._every_s = every_s
        self._lock = threading.Lock()
        self._now: list[str] = []
        self._later: list[str] = []
        self._publishing = False
        self._stopping = threading.Event()
        self.published = 0

    def ship(self, ids: list[str]) -> None:
        """Publish these before all others."""
        with self._lock:
            self._now += ids

    def trickle(self, ids: list[str]) -> None:
        """Publish these slowly."""
        with self._lock:
            self._later += ids

    def hurry(self) -> None:
        """Publish all that is left at once."""
        with self._lock:
            self._now, self._later = self._now + self._later, []

    @property
    def empty(self) -> bool:
        """Return True when everything is on the queue."""
        with self._lock:
            return not (self._now or self._later or self._publishing)

    def stop(self) -> None:
        """Let the thread end."""
        self._stopping.set()

    def run(self) -> None:
        """Publish until stopped; a broker that is away or takes no messages is waited for."""
        from common.errors import BrokerUnavailable, PublishRefused

        while not self._stopping.is_set():
            with self._lock:
                pending = self._now or self._later
                at_once = pending is self._now
                ids = pending[: 100 if at_once else 1]
                del pending[: len(ids)]
                self._publishing = bool(ids)
            if not ids:
                self._stopping.wait(0.05)
                continue
            try:
                self._publish(ids)
            except (
                BrokerUnavailable,
                PublishRefused,
            ):  # some may have arrived: they are published once more
                with self._lock:
                    (self._now if at_once else self._later)[:0] = ids
                self._stopping.wait(0.3)
                continue
            with self._lock:
                self.published += len(ids)
                self._publishing = False
            if not at_once:
                self._stopping.wait(self._every_s)
