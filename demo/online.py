"""The daemon as a child process, its posts and their media, and what the database says of them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common.errors import TaggingError
from common.progress import progress_bar
from config.settings import Settings, StoreSettings
from king.broker.connect import publish_posts
from king.messages import PostMessage
from king.status import read_health
from king.store.client import StoreClient

START_TIMEOUT_S = 240.0
STALL_TIMEOUT_S = 120.0
_POLL_S = 0.1
_STOP_S = 30.0


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the daemon logs its own downloads."""

    def list_directory(self, path: Any) -> None:
        """Serve files only."""
        self.send_error(404)


@contextlib.contextmanager
def media_server(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of 127.0.0.1, so that downloads are real; yields its URL."""
    handler = partial(_Files, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="media", daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def daemon(
    command: Sequence[str], settings: Settings, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon until the block ends; yields when it serves, and raises when it does not."""
    settings.king.health_file.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C is for us, and we tell it to drain.
        child = subprocess.Popen(  # noqa: S603  our own script, by this interpreter
            [sys.executable, "online_process.py", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_until_serving(child, settings.king.health_file, log)
        yield child
    finally:
        _stop(child)


def _wait_until_serving(child: subprocess.Popen[bytes], health_file: Path, log: Path) -> None:
    with progress_bar("daemon loads", None) as bar:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            alive(child, log)
            health = read_health(health_file)
            if health is not None and health.get("pid") == child.pid:
                bar.note(str(health.get("phase", "")))
                if health.get("phase") == "serving":
                    bar.update(1, total=1)
                    return
            time.sleep(_POLL_S)
    raise TaggingError(f"the daemon does not serve after {START_TIMEOUT_S:.0f} s; see {log}")


def alive(child: subprocess.Popen[bytes], log: Path) -> None:
    """Raise a `TaggingError` with its last line when the daemon has ended."""
    if child.poll() is not None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1][:300] if lines else "it said nothing"
        raise TaggingError(f"the daemon ended with {child.returncode}; see {log}: {last}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let it drain; end it and its children when it does not."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_S)
    if child.poll() is None:
        child.kill()  # its workers die with it
        child.wait()


class PostBox:
    """The demo's posts in the database."""

    def __init__(self, settings: StoreSettings) -> None:
        self._client = StoreClient(settings)

    def put(self, file: Path, url: str) -> list[str]:
        """Write a data file's posts without result, their media as URLs; gives their IDs."""
        entries = json.loads(file.read_text(encoding="utf-8"))
        ids = [str(entry["post_id"]) for entry in entries]
        client = self._client
        with client.edge():
            client.jobs.delete_many({"_id": {"$in": ids}})  # of a run that was cut short
            client.posts.delete_many({"_id": {"$in": ids}})
            client.posts.insert_many([_document(entry, url, client.settings) for entry in entries])
        return ids

    def results(self, post_ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Return the results by post ID."""
        path = self._client.settings.result_path
        with self._client.edge():
            documents = list(self._client.posts.find({"_id": {"$in": list(post_ids)}}))
        return {
            str(document["_id"]): document[path] for document in documents if document.get(path)
        }

    def close(self) -> None:
        self._client.close()


def _document(entry: Mapping[str, Any], url: str, settings: StoreSettings) -> dict[str, Any]:
    fields = settings.fields
    document = {
        "_id": entry["post_id"],
        fields.text: entry["text"],
        fields.labels: entry["labels"],
    }
    media = {"images": fields.images, "videos": fields.videos, "audios": fields.audios}
    urls = {path: [f"{url}/{name}" for name in entry[key]] for key, path in media.items()}
    return document | urls


def publish_and_wait(
    settings: Settings, box: PostBox, ids: Sequence[str], child: subprocess.Popen[bytes], log: Path
) -> tuple[dict[str, Mapping[str, Any]], float]:
    """Publish the posts and wait for their results; TaggingError when none comes for long.

    Return them by post ID, and the seconds from publishing to the last one.
    """
    started = time.monotonic()
    publish_posts(settings.broker, [PostMessage(post_id, force=True) for post_id in ids])
    results: dict[str, Mapping[str, Any]] = {}
    latest = time.monotonic()
    with progress_bar("posts tagged", len(ids)) as bar:
        while len(results) < len(ids):
            alive(child, log)
            latest_results = box.results(ids)
            if len(latest_results) > len(results):
                latest = time.monotonic()
            results = latest_results
            bar.update(len(results))
            if time.monotonic() - latest > STALL_TIMEOUT_S:
                missing = len(ids) - len(results)
                raise TaggingError(
                    f"{missing} of {len(ids)} posts have no result; see {log} and `insighttag dead`"
                )
            time.sleep(_POLL_S)
    return results, latest - started
