"""The target of the fuzzing: the real daemon, its servers on loopback, and a host of bad files."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import redis
import yaml
from pymongo.errors import OperationFailure, WriteError

from config.settings import Settings
from deploy import embedded
from extractors.suite import ExtractorSuite
from fuzzing import liar
from fuzzing.cases import Cases
from fuzzing.ids import ODD_IDS
from fuzzing.messages import BadMessage
from king.broker.connect import publish_posts
from king.messages import PostMessage
from king.store.client import StoreClient
from king.store.documents import id_text
from king.store.store import Store
from tests.support.tiny_models import tiny_features
from tests.support.workers.small_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
PACKINGS: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = MappingProxyType(
    {
        "packed": ("gzip", gzip.compress),
        "stray": ("gzip", lambda content: gzip.compress(content) + b"x"),
        "padded": ("deflate", lambda content: zlib.compress(content) + b"\0" * 70_000),
        "members": (
            "gzip",
            lambda content: gzip.compress(content[:99]) + gzip.compress(content[99:]) + b"\x1f",
        ),
        "hollow": (
            "gzip",
            lambda content: gzip.compress(b"") * 5000 + gzip.compress(content) + b"\x1f\x8b",
        ),
        "cut": ("gzip", lambda content: gzip.compress(content)[:-5]),
        # Without the two bytes before and the four behind that make it a zlib stream.
        "raw": ("deflate", lambda content: zlib.compress(content)[2:-4]),
        "raw-stray": ("deflate", lambda content: zlib.compress(content)[2:-4] + b"x" * 9),
        "zlib-as-gzip": ("gzip", zlib.compress),
        "unpacked": ("gzip", lambda content: content),
        "unlabelled": ("", gzip.compress),
        "charset": ("utf-8", lambda content: content),
        "upload": ("aws-chunked", lambda content: content),
        "twice": ("gzip, gzip", lambda content: gzip.compress(gzip.compress(content))),
        "brotli": ("br", gzip.compress),
        "no-label": ("\x7f,;q=x" * 50, gzip.compress),
        "bomb": ("gzip", lambda content: gzip.compress(content + b"\0" * (64 << 20), 9)),
    }
)
"""Fault -> the label of a packed body, and what is sent."""

FAULTS = (*PACKINGS, "short", "reset", "html", "empty", "slow", "loop", "gone")
"""Faults of the server besides sending bad files; ``/FAULT/path``."""

TEXTS = (
    "a post",
    '{"$gt": ""}',
    "$where: sleep(1000)",
    "\0\0\x1b[2J\x07",
    "\u202egnihtemos \u200b\ufeff",
    "e\u0301" * 5000,
    "字" * 20_000,
    "<script>alert(1)</script> ' OR 1=1 --",
    "[CLS] [SEP] [MASK] [PAD]",
    "\U0010ffff\ufffe",
)
"""Texts of the other half of the posts."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BadHost

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        *fault, path = self.path.lstrip("/").split("/")
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer(fault[0] if fault else "", path)

    def _answer(self, fault: str, path: str) -> None:
        content = self.server.content(path)
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        status = {"gone": 410, "slow": 503, "loop": 302}.get(fault, 200)
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if fault == "html" else "image/png")
        if fault == "loop":
            self.send_header("Location", self.path)
        if fault in PACKINGS:
            label, pack = PACKINGS[fault]
            self.send_header("Content-Encoding", label)
            content = pack(content)
        if fault == "empty":
            content = b""
        self.close_connection = fault == "short"
        more = 1000 if fault == "short" else 0
        self.send_header("Content-Length", str(len(content) + more))
        self.end_headers()
        self.wfile.write(content)


class BadHost(ThreadingHTTPServer):
    """A server of the cases by the number that their paths begin with."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, cases: Cases) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._cases = cases
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def content(self, path: str) -> bytes:
        """Return the file of a path."""
        return self._cases[int(path.partition(".")[0])].content

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that hangs up."""

    def close(self) -> None:
        """End the thread."""
        self.shutdown()
        self._thread.join()
        self.server_close()


def site_settings(folder: Path, *, ocr: bool = False) -> Settings:
    """Return settings with the smallest models, short back-off, and everything in one folder."""
    return Settings.model_validate(
        {
            "broker": {"prefetch": 48},
            "features": tiny_features(ocr=ocr).model_dump(),
            "fetch": {"spool": folder / "spool", "allow_private_hosts": True, "connections": 8},
            "decode": {"processes": 2, "deadline_s": 20},
            "fusion": {"bundle": folder / "bundle"},
            "workers": {"slots": 8, "extractors": [{"threads": 1}]},
            "king": {
                "health_file": folder / "king.json",
                "attempts": 3,
                "backoff_s": 0.2,
                "backoff_max_s": 0.5,
                "post_deadline_s": 120,
            },
            "embedded": {"folder": folder / "embedded"},
            "log": {"format": "json", "level": "warning"},
        }
    )


class Site:
    """The daemon and what it works on; the folder is left to the caller.

    Attributes:
        settings: With the URLs of the running services.
        deaths: How often the King ended without being told to.
    """

    def __init__(self, folder: Path, cases: Cases, *, ocr: bool = False) -> None:
        """Start the services, make a bundle, and put the posts into the database."""
        self._embedded = site_settings(folder, ocr=ocr)
        self._folder = folder
        self._host = BadHost(cases)
        self._king: subprocess.Popen[bytes] | None = None
        self.deaths = 0
        self.settings = embedded.resolve(self._embedded)
        self.store = Store(StoreClient(self.settings.store))
        suite = ExtractorSuite(self.settings.features)
        suite.load()
        write_bundle(self.settings.fusion.bundle, suite)
        suite.close()
        self._config = folder / "settings.yaml"
        self._config.write_text(yaml.safe_dump(self.settings.model_dump(mode="json")), "utf-8")
        start = folder / "start"
        start.mkdir()
        (start / "sitecustomize.py").write_text("from fuzzing.liar import lie_once\n\nlie_once()\n")
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(start), str(ROOT), str(ROOT / "bench"))),
            liar.VARIABLE: str(max(8, len(cases) // 20)),
        }
        self.post_ids = [self._add(cases, number) for number in range(len(cases))]
        self.odd_ids = self._add_odd_ids()
        self.post_ids += self.odd_ids

    def _add(self, cases: Cases, number: int) -> str:
        case = cases[number]
        turn, rest = divmod(number, min(25, max(2, len(cases) // len(FAULTS))))
        fault = "" if rest else f"{FAULTS[turn % len(FAULTS)]}/"
        document: dict[str, Any] = {
            "_id": f"post-{number:05}",
            "text": TEXTS[number // 2 % len(TEXTS)] if number % 2 else "",
            f"{case.kind}s": [f"{self._host.url}/{fault}{case.path}"],
            "case": case.name,
        }
        self.store.client.posts.insert_one(document)
        return str(document["_id"])

    def _add_odd_ids(self) -> list[str]:
        """Add a post for each type of ID that the database takes; return the texts of all types."""
        for value in ODD_IDS:
            with suppress(WriteError, OperationFailure):
                self.store.client.posts.insert_one({"_id": value, "text": "odd", "case": "odd ID"})
        return [id_text(value) for value in ODD_IDS]

    def publish(self, messages: Sequence[BadMessage]) -> None:
        """Put posts and bad messages on the queue, evenly mixed."""
        count = len(self.post_ids) + len(messages)
        places = {i * count // len(messages): i for i in range(len(messages))}
        posts = iter(self.post_ids)
        batch: list[PostMessage] = []
        with redis.Redis.from_url(self.settings.broker.url) as client:
            for place in range(count):
                if place in places:
                    publish_posts(self.settings.broker, batch)
                    batch = []
                    client.lpush(self.settings.broker.queue, messages[places[place]].item)
                else:
                    batch.append(PostMessage(next(posts)))
        publish_posts(self.settings.broker, batch)

    def start_king(self) -> None:
        """Start the daemon."""
        with (self._folder / "king.log").open("ab") as log:
            self._king = subprocess.Popen(
                [sys.executable, "online_process.py", "--config", str(self._config)],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def look_after_king(self) -> int:
        """Start it again when it has died; its resident memory in bytes, or 0."""
        if self._king is None or self._king.poll() is not None:
            self.deaths += 1
            self.start_king()
            return 0
        try:
            return int(psutil.Process(self._king.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def lies(self) -> int:
        """Return how often the daemon has killed a worker for what it said."""
        log = (self._folder / "king.log").read_text(encoding="utf-8", errors="replace")
        return log.count('"event": "workers.bad_message"')

    def phase(self) -> str:
        """Return the phase that the King reports."""
        with suppress(OSError, ValueError):
            return str(json.loads((self._folder / "king.json").read_text("utf-8"))["phase"])
        return "starting"

    def stop_king(self) -> None:
        """Send SIGTERM; an exit that is not clean counts as a death."""
        if self._king is None:
            return
        self._king.terminate()
        try:
            code = self._king.wait(60)
        except subprocess.TimeoutExpired:
            self._king.kill()
            code = self._king.wait()
        if code:
            self.deaths += 1

    def spool_files(self) -> int:
        """Return downloads that were left behind."""
        paths = self.settings.fetch.spool.rglob("*")
        return sum(path.is_file() and path.name not in (".lock", "lock") for path in paths)

    def queue_left(self) -> int:
        """Return messages that wait or are unacknowledged."""
        queue = self.settings.broker.queue
        with redis.Redis.from_url(self.settings.broker.url) as client:
            return int(client.llen(queue)) + int(client.hlen(f"{queue}.unacked"))

    def close(self) -> None:
        """Stop everything."""
        if self._king is not None and self._king.poll() is None:
            self._king.kill()
            self._king.wait()
        self.store.close()
        self._host.close()
        embedded.stop(self._embedded)
