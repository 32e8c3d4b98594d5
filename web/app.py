"""The routes and their answers; refusals are raised, and become JSON in `web.guard`.

POST /v1/tag          a post in, its tags out; needs neither queue nor database
POST /v1/posts/<id>   put it on the queue       GET /v1/posts/<id>   its state and tags
GET  /v1/labels       all tags of the bundle    GET /                a page to try it
GET  /healthz         the process is alive      GET /readyz          everything it needs answers
GET  /metrics         for Prometheus    GET /openapi.json, /docs  this interface
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import NotFound
from werkzeug.routing import PathConverter

from common.errors import BundleError, ConfigError, TaggingError
from common.post import Tags, rounded
from common.times import plain
from config.labels import LabelMap
from config.settings import Settings
from fusion.bundle.folder import thresholds_of
from king.messages import PostMessage
from web import openapi
from web.backend import Backend, Services, state_of
from web.guard import ApiError, bad_request, guard, note, of_tagging
from web.metrics import HttpMetrics
from web.reading import Uploads, checked_id, read_post, read_queue_body
from workers.post_run import PostTags
from workers.runner import PostRunner

# How often a waiting request checks that its client is still connected.
_LOOK_S = 0.5
_YES_NO = {"": False, "0": False, "false": False, "1": True, "true": True}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FOLDER = Path(__file__).resolve().parent / "static"
_TYPES = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)


class _AnyId(PathConverter):
    """A post's ID may hold slashes."""

    part_isolating = False


def create_app(
    settings: Settings, runner: PostRunner, uploads: Uploads, services: Services
) -> Flask:
    """Return the WSGI application; the caller starts and closes the runner.

    Uploads lie in the only folder that the runner may read from.
    """
    app = Flask(__name__, static_folder=None)
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # The result of a post is shown as it is stored, also where the platform has written into it.
    app.json.default = plain  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False
    app.url_map.converters["any_id"] = _AnyId
    metrics = HttpMetrics(runner)
    guard(app, settings.http, metrics.answered)
    routes = _Routes(settings, runner, uploads, services, metrics)
    app.add_url_rule("/", "page", routes.page)
    app.add_url_rule("/assets/<path:name>", "assets", routes.assets)
    app.add_url_rule("/healthz", "healthz", routes.healthz)
    app.add_url_rule("/readyz", "readyz", routes.readyz)
    app.add_url_rule("/metrics", "metrics", routes.metrics)
    app.add_url_rule("/openapi.json", "openapi", routes.openapi)
    app.add_url_rule("/docs", "docs", routes.docs)
    app.add_url_rule("/v1/labels", "labels", routes.all_labels)
    app.add_url_rule("/v1/tag", "tag", routes.tag, methods=["POST"])
    rule = "/v1/posts/<any_id:post_id>"
    app.add_url_rule(rule, "publish", routes.publish, methods=["POST"])
    app.add_url_rule(rule, "post", routes.post, methods=["GET"])
    return app


class _Routes:
    """One method per route."""

    def __init__(
        self,
        settings: Settings,
        runner: PostRunner,
        uploads: Uploads,
        services: Services,
        metrics: HttpMetrics,
    ) -> None:
        self._http = settings.http
        self._metrics = metrics
        self._runner = runner
        self._uploads = uploads
        self._labels = Labels(settings.fusion.bundle)
        self._page = Page()
        self._backend = Backend(services, probe_timeout_s=settings.http.probe_timeout_s)

    def tag(self) -> Response:
        """Tag the post in the request."""
        all_scores = _flag("scores")
        self._check_ready()  # before the body, which may be large, is read
        with self._uploads.box() as box:
            post = read_post(request, box, self._http)
            note(post_id=post.post_id, media=len(post.media))
            try:
                future = self._runner.submit(
                    post, deadline_s=self._http.deadline_s, wait_s=self._http.queue_s
                )
                ran = _wait(future)
            except TaggingError as error:
                raise self._refusal(error) from error
        self._metrics.posts.timed(ran.timings_ms)
        self._metrics.posts.tagged(ran.result)
        labels = self._labels if all_scores else None
        document = tagged(ran, labels=labels, hide=self._uploads.hide)
        note(tags=len(document["tags"]), work_ms=document["timings_ms"])
        return jsonify(document)

    def all_labels(self) -> Response:
        """Return all tags of the served bundle."""
        self._check_ready()
        bundle = self._runner.bundle or ("", "")
        names = self._labels.of(bundle).names
        labels = [{"id": i, "name": name} for i, name in enumerate(names)]
        return jsonify({"model": bundle[0], "version": bundle[1], "labels": labels})

    def _check_ready(self) -> None:
        if not self._runner.ready:
            raise ApiError(
                503,
                "NotReady",
                self._runner.trouble or "the models are being loaded",
                retry_after_s=self._http.retry_after_s,
            )

    def _refusal(self, error: TaggingError) -> ApiError:
        refused = of_tagging(error, retry_after_s=self._http.retry_after_s)
        refused.message = self._uploads.hide(refused.message)
        refused.reasons = {m: self._uploads.hide(text) for m, text in error.reasons.items()}
        return refused

    def publish(self, post_id: str) -> tuple[Response, int]:
        """Put a post on the queue."""
        message_id = checked_id(post_id)
        body = read_queue_body(request, self._http)
        note(post_id=message_id)
        message = PostMessage(message_id, priority=body.priority, force=body.force)
        warning = self._backend.publish(message)
        about = {"warning": warning} if warning else {}
        return jsonify({"post_id": message_id, "state": "queued", **about}), 202

    def post(self, post_id: str) -> Response:
        """Return the state of a post and its tags."""
        name = checked_id(post_id)
        note(post_id=name)
        stored, job = self._backend.look_up(name)
        if stored is None and job is None:
            raise ApiError(404, "PostNotFound", f"post {name!r} is not in the database")
        return jsonify({"post_id": name, **state_of(stored, job)})

    def healthz(self) -> Response:
        return jsonify({"status": "ok"})

    def readyz(self) -> tuple[Response, int]:
        """Report each part; 503 when one is missing. ``?only=workers`` asks for tagging alone."""
        only = request.args.get("only", "")
        if only not in ("", "workers"):
            raise bad_request(f"only: must be workers, or left out; got {only[:100]!r}")
        runner = self._runner
        loading = None if runner.ready else "the models are being loaded"
        parts: dict[str, str | None] = {"workers": runner.trouble or loading}
        if not only:
            parts.update(self._backend.trouble())
        bundle = runner.bundle
        document = {
            "ready": not any(parts.values()),
            "bundle": {"name": bundle[0], "version": bundle[1]} if bundle else None,
            "in_flight": runner.in_flight,
            "parts": {name: reason or "ok" for name, reason in parts.items()},
        }
        return jsonify(document), 200 if document["ready"] else 503

    def metrics(self) -> Response:
        """Return the metrics for Prometheus."""
        content, content_type = self._metrics.page(request.headers.get("Accept", ""))
        return Response(content, content_type=content_type)

    def openapi(self) -> Response:
        """Return the OpenAPI document of these routes."""
        return jsonify(openapi.document())

    def docs(self) -> Response:
        """Return the page that shows it."""
        return _page(openapi.page().encode())

    def page(self) -> Response:
        return self._page.answer("page.html")

    def assets(self, name: str) -> Response:
        return self._page.answer(name)


class Page:
    """The page and its assets: files of this package, held in memory."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir())}

    def answer(self, name: str) -> Response:
        """Return a file, revalidated by its ETag: a new release is seen at once."""
        content = self._files.get(name)
        kind = _TYPES.get(Path(name).suffix)
        if content is None or kind is None:
            raise NotFound
        return _page(content, kind)


def _page(content: bytes, kind: str = _TYPES[".html"]) -> Response:
    response = Response(content, content_type=kind)
    response.headers["Cache-Control"] = "no-cache"
    if kind.startswith("text/html"):
        response.headers["Content-Security-Policy"] = PAGE_POLICY
    response.add_etag()
    response.make_conditional(request)  # in place: 304 without a body when the client has it
    return response


def client_is_gone(environ: dict[str, Any]) -> bool:
    """Tell whether the client has closed its connection; False where that cannot be seen."""
    connection = environ.get("gunicorn.socket")
    if not isinstance(connection, socket.socket):
        return False
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        # Readable may also mean bytes of a next request: only the end of the stream counts.
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def _flag(name: str) -> bool:
    value = request.args.get(name, "")
    if value.lower() not in _YES_NO:
        raise bad_request(f"{name}: must be 0 or 1, got {value[:100]!r}")
    return _YES_NO[value.lower()]


def _wait(future: Future[PostTags]) -> PostTags:
    """Return the result; cancel the work when the client has gone."""
    while True:
        try:
            return future.result(_LOOK_S)
        except NotYet:
            if future.done():
                raise
        if client_is_gone(request.environ):
            future.cancel()
            raise ApiError(499, "ClientClosedRequest", "the client has disconnected")


class Labels:
    """The names and thresholds of the classes of the bundle that is served."""

    def __init__(self, bundle: Path) -> None:
        self._folder = bundle
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str], LabelMap, tuple[float, ...]] | None = None

    def of(self, bundle: tuple[str, str]) -> LabelMap:
        """Return the names for a bundle, read again when it changes; or raise BundleError."""
        return self._read(bundle)[0]

    def thresholds(self, bundle: tuple[str, str]) -> tuple[float, ...]:
        """Return the thresholds for a bundle; none where the folder holds another one by now."""
        return self._read(bundle)[1]

    def _read(self, bundle: tuple[str, str]) -> tuple[LabelMap, tuple[float, ...]]:
        with self._lock:
            if self._known is None or self._known[0] != bundle:
                try:
                    labels = LabelMap.load(self._folder / "labels.json")
                except ConfigError as error:
                    raise BundleError(str(error)) from error
                self._known = (bundle, labels, thresholds_of(self._folder, bundle[1]))
            return self._known[1:]


def tagged(
    ran: PostTags, *, labels: Labels | None = None, hide: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return the answer to ``POST /v1/tag``, with the scores of all classes where labels are given.

    ``hide`` replaces the server's own paths in messages. Raises BundleError for unfit labels.
    """
    result, tags = ran.result.measured(ran.timings_ms), ran.tags
    failures = {
        modality: replace(failure, message=hide(failure.message))
        for modality, failure in result.failures.items()
    }
    document = replace(result, failures=failures).answer()
    if labels is not None:
        document["scores"] = _all_scores(tags, labels)
    return document


def _all_scores(tags: Tags, known: Labels) -> list[dict[str, Any]]:
    """Return every class with its score and, where it is known, its threshold, highest first."""
    bundle = tags.model, tags.version
    labels, thresholds = known.of(bundle), known.thresholds(bundle)
    if len(labels) != len(tags.scores):
        raise BundleError("labels.json does not belong to the bundle that is served")
    scores: list[dict[str, Any]] = [
        {"id": i, "name": name, "score": rounded(score)}
        for i, (name, score) in enumerate(zip(labels.names, tags.scores.tolist(), strict=True))
    ]
    if len(thresholds) == len(scores):
        for each, threshold in zip(scores, thresholds, strict=True):
            each["threshold"] = threshold
    return sorted(scores, key=lambda each: (-each["score"], each["id"]))
