"""Fixtures of the HTTP server's tests: an application over fake workers, and a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from config.settings import Settings
from tests.support import media
from tests.support.fakes.pool import FakePool
from tests.support.ports import free_port
from tests.support.processes import file_server
from tests.support.tiny_models import tiny_bundle, tiny_features
from tests.support.workers.driving import toy_settings
from web.app import create_app, routes_of
from web.backend import Services
from web.uploads import Uploads
from workers.runner import PostRunner

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Desk:
    """The application over fake workers.

    Attributes:
        spool: Where uploads lie, under a folder of this process.
    """

    client: Any
    pool: FakePool
    runner: PostRunner
    uploads: Uploads
    spool: Path

    @property
    def files(self) -> list[str]:
        """Return the files in the uploads' folder, without its lock."""
        return [path.name for path in self.uploads.folder.iterdir() if path.name != "lock"]


def desk_settings(folder: Path, **http: Any) -> Settings:
    bundle = folder / "bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "labels.json").write_text('{"0": "sport", "1": "雨"}', encoding="utf-8")
    return Settings.model_validate(
        {
            "http": {"queue_s": 0.1, "deadline_s": 5, **http},
            "fetch": {"spool": str(folder / "spool")},
            "fusion": {"bundle": str(bundle)},
            "broker": {"url": "redis://127.0.0.1:1/0", "socket_timeout_s": 0.5},
            "store": {"url": "mongodb://127.0.0.1:1/", "timeout_s": 0.5},
        }
    )


def make_desk(settings: Settings, pool: FakePool) -> Iterator[Desk]:
    uploads = Uploads(settings.fetch.spool, max_files=settings.http.max_files)
    runner = PostRunner(settings, pool=pool, local_root=uploads.folder, limit=settings.http.posts)
    services = Services(lambda: settings, lambda: settings)
    app = create_app(settings, runner, uploads, services)
    runner.start(wait=False)
    try:
        yield Desk(app.test_client(), pool, runner, uploads, settings.fetch.spool)
    finally:
        runner.close()
        routes_of(app).backend.close()
        uploads.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """The application over workers that answer everything; no upload is left afterwards."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    settings = desk_settings(
        tmp_path, max_body_bytes=100_000, max_json_bytes=10_000, max_files=4, max_text_chars=1000
    )
    for made in make_desk(settings, FakePool(downloads)):
        made.runner.start()
        yield made
        assert made.files == []
        assert list(downloads.iterdir()) == []


@dataclass
class Site:
    """Media on disk and on a loopback server, a bundle, and settings as a file."""

    folder: Path
    media_url: str
    settings: Settings
    config: Path

    @property
    def media(self) -> Path:
        """The folder of media."""
        return self.folder / "media"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Small media, small models, small bundle."""
    folder = tmp_path_factory.mktemp("http")
    files = folder / "media"
    files.mkdir()
    media.write_png(files / "a.png", media.quadrants(90, 70))
    sound = media.tone(duration_s=2, rate_hz=44100)
    media.write_video(files / "v.mp4", media.grey_steps(30), audio=sound)
    media.write_wav(files / "s.wav", media.tone(duration_s=1.5))
    features = tiny_features()
    tiny_bundle(folder / "bundle", features)
    settings = toy_settings(
        folder / "spool",
        fetch={"allow_private_hosts": True},
        features=features.model_dump(),
        decode={"memory_mb": 600},
        fusion={"bundle": str(folder / "bundle")},
        embedded={"folder": str(folder / "embedded")},
        log={"format": "json", "level": "info"},
    )
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(json.loads(settings.model_dump_json())), encoding="utf-8")
    with file_server(files) as url:
        yield Site(folder, url, settings, config)


class FlaskServer:
    """``python flask_server.py`` on a free port."""

    def __init__(self, config: Path, folder: Path, *overrides: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"flask-{self.port}.log"
        self.spool = folder / f"spool-{self.port}"
        command = [sys.executable, "flask_server.py", "--config", str(config)]
        command += ["--port", str(self.port), "--set", f"fetch.spool={self.spool}"]
        for override in overrides:
            command += ["--set", override]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def answer(self, path: str, **options: Any) -> requests.Response | None:
        """A GET, or None while nothing listens."""
        try:
            return requests.get(self.url + path, timeout=20, **options)
        except requests.ConnectionError:
            return None

    def until_ready(self, timeout_s: float = 120) -> FlaskServer:
        """Wait for the workers."""
        end = time.monotonic() + timeout_s
        while True:
            found = self.answer("/readyz?only=workers")
            if found is not None and found.status_code == 200:
                return self
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.2)

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a name in its log."""
        lines = [json.loads(line) for line in self.said.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def descendants(self) -> list[psutil.Process]:
        """The processes under it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; gives its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """End it, whatever it takes."""
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            for each in [*self.descendants(), psutil.Process(self.process.pid)]:
                each.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def server(site: Site) -> Iterator[FlaskServer]:
    """A real server that is ready; shared by the tests that only ask it."""
    made = FlaskServer(site.config, site.folder)
    try:
        yield made.until_ready()
    finally:
        made.close()


def no_traceback(text: str) -> bool:
    """Tell if an answer shows no internals."""
    return not re.search(r"Traceback|File \"|king-[0-9a-f]{8}|/tmp/", text)
