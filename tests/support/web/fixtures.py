"""Fixtures of the HTTP server's tests: an application over fake workers, and a real server."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from config.settings import Settings
from tests.support.fakes.pool import FakePool
from web import openapi
from web.app import create_app
from web.backend import Services
from web.reading import Uploads
from workers.runner import PostRunner

ROOT = Path(__file__).resolve().parents[3]


class CheckedClient(FlaskClient):
    """A client that holds every answer to the OpenAPI document."""

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        """Send a request; ValidationError for an answer that is not as described."""
        response = super().open(*args, **kwargs)
        adapter = self.application.url_map.bind_to_environ(response.request.environ)
        try:
            rule, _ = adapter.match(return_rule=True)
        except HTTPException:
            return response  # no such route or method
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        document = openapi.document()
        method = document["paths"].get(path, {}).get(response.request.method.lower())
        heard = response.status_code != 499  # the client had hung up
        if method is not None and heard and response.mimetype == "application/json":
            described = method["responses"][str(response.status_code)]
            if "$ref" in described:
                described = document["components"]["responses"][described["$ref"].split("/")[-1]]
            schema = described["content"]["application/json"]["schema"]
            OAS31Validator({**schema, "components": document["components"]}).validate(response.json)
        return response


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
    (bundle / "bundle.yaml").write_text("version: '1'\nthresholds:\n- 0.5\n- 0.125\nmetrics: {}\n")
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
    app.test_client_class = CheckedClient
    runner.start(wait=False)
    try:
        yield Desk(app.test_client(), pool, runner, uploads, settings.fetch.spool)
    finally:
        runner.close()
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


def no_traceback(text: str) -> bool:
    """Tell if an answer shows no internals."""
    return not re.search(r"Traceback|File \"|king-[0-9a-f]{8}|/tmp/", text)
