"""Answers over fake workers: tags, all scores, labels, health, queue and database away."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.support.fakes.pool import FakePool
from tests.support.web.fixtures import Desk, desk_settings, make_desk


def test_tags_with_and_without_all_scores(desk: Desk) -> None:
    plain = desk.client.post("/v1/tag", json={"text": "x", "post_id": "p/1"})
    assert plain.status_code == 200
    assert plain.json == {
        "post_id": "p/1",
        "model": "fake",
        "version": "1",
        "status": "tagged",
        "tags": [{"id": 0, "name": "sport", "score": 0.9}],
        "modalities": {
            "video": "missing",
            "image": "missing",
            "audio": "missing",
            "text": "ok",
            "ocr": "missing",
        },
        "failures": {},
        "error": None,
        "ocr": "nothing_found",
        "timings_ms": plain.json["timings_ms"],
    }
    assert plain.json["timings_ms"]["total"] >= 0
    full = desk.client.post("/v1/tag?scores=1", json={"text": "x"})
    assert full.json["scores"] == [
        {"id": 0, "name": "sport", "score": 0.9, "threshold": 0.5},
        {"id": 1, "name": "雨", "score": 0.1, "threshold": 0.125},
    ]
    assert full.json["post_id"].startswith("http-")
    assert "雨" in full.text


def test_labels_follow_the_bundle(desk: Desk, tmp_path: Path) -> None:
    """They are read anew when another bundle is served; a missing file is our mistake: 500."""
    labels = desk.client.get("/v1/labels").json
    assert labels["labels"] == [{"id": 0, "name": "sport"}, {"id": 1, "name": "雨"}]
    (tmp_path / "bundle" / "labels.json").write_text('{"0": "a", "1": "b"}', encoding="utf-8")
    assert desk.client.get("/v1/labels").json == labels
    desk.pool.swap_bundle("fake", "2")
    assert [each["name"] for each in desk.client.get("/v1/labels").json["labels"]] == ["a", "b"]
    shutil.rmtree(tmp_path / "bundle")
    desk.pool.swap_bundle("fake", "3")
    missing = desk.client.get("/v1/labels")
    assert missing.status_code == 500
    assert missing.json["error"]["type"] == "BundleError"


def test_queue_and_database_away(desk: Desk) -> None:
    """Tagging needs neither; what needs them says which is away, and when to try again."""
    assert desk.client.post("/v1/tag", json={"text": "x"}).status_code == 200
    for method, name in (("post", "BrokerUnavailable"), ("get", "StoreUnavailable")):
        response = getattr(desk.client, method)("/v1/posts/p1")
        assert response.status_code == 503
        assert response.json["error"]["type"] == name
        assert response.headers["Retry-After"] == "5"
    ready = desk.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json["parts"]["workers"] == "ok"
    assert ready.json["parts"]["broker"].startswith("BrokerUnavailable")
    assert ready.json["parts"]["store"].startswith("StoreUnavailable")
    assert desk.client.get("/readyz?only=workers").status_code == 200
    assert desk.client.get("/readyz?only=x").status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"json": {"priority": 10}}, 400, "priority"),
        ({"json": {"priority": "3"}}, 400, "priority"),
        ({"json": {"priority": 1.5}}, 400, "priority"),
        ({"json": {"force": 1}}, 400, "force"),
        ({"json": {"prio": 1}}, 400, "did you mean 'priority'?"),
        ({"json": []}, 400, "must be a JSON object"),
        ({"data": "x", "content_type": "text/plain"}, 415, "application/json"),
    ],
)
def test_mistakes_in_what_is_published(
    desk: Desk, body: dict[str, object], status: int, reason: str
) -> None:
    """They are named before the broker is asked, which is away here."""
    response = desk.client.post("/v1/posts/p1", **body)
    assert response.status_code == status
    assert reason in response.json["error"]["message"]
    assert desk.client.post("/v1/posts/" + "x" * 513).status_code == 400
    assert "at most 512" in desk.client.get("/v1/posts/" + "x" * 513).json["error"]["message"]


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "downloads").mkdir()
    pool = FakePool(tmp_path / "downloads", ready_after_s=600)
    yield from make_desk(desk_settings(tmp_path), pool)


def test_while_models_are_loaded(loading: Desk) -> None:
    """Alive, not ready; a post is refused before its body is read."""
    assert loading.client.get("/healthz").json == {"status": "ok"}
    ready = loading.client.get("/readyz?only=workers")
    assert ready.status_code == 503
    assert ready.json["parts"] == {"workers": "the models are being loaded"}
    assert ready.json["bundle"] is None
    response = loading.client.post("/v1/tag", json={"text": "x"})
    assert (response.status_code, response.json["error"]["type"]) == (503, "NotReady")
    assert int(response.headers["Retry-After"]) > 0
    assert loading.client.get("/v1/labels").status_code == 503


def test_safe_headers_and_a_page_from_here_alone(desk: Desk) -> None:
    """The page may load what this server has, and nothing else; an API's answer nothing at all."""
    page = desk.client.get("/")
    assert page.status_code == 200
    assert page.mimetype == "text/html"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    for outside in ("http://", "https://", "<style", "onclick", "style="):
        assert outside not in page.text.replace("http:// or https:// URL", "")
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"/assets/{name}" in page.text
        assert desk.client.get(f"/assets/{name}").status_code == 200
    api = desk.client.get("/healthz")
    assert api.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert api.headers["X-Content-Type-Options"] == "nosniff"
    assert api.headers["Cache-Control"] == "no-store"


def test_one_line_a_request_without_payloads(desk: Desk) -> None:
    """Its ID is the client's where that is plain, and another where it could break a log."""
    with structlog.testing.capture_logs() as events:
        desk.client.post(
            "/v1/tag", json={"text": "SECRET words", "images": ["http://h/SECRET.png"]}
        )
        desk.client.post("/v1/tag", data="{SECRET", content_type="application/json")
    lines = [event for event in events if event["event"] == "http.request"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["media"] == 1
    assert lines[0]["route"] == "/v1/tag"
    assert lines[1]["error"] == "BadRequest"
    assert all(line["request_id"] and line["ms"] >= 0 for line in lines)
    assert "SECRET" not in str(events)
    for request_id, is_kept in (
        ("abc-1.2_3", True),
        ("a b", False),
        ("x" * 65, False),
        ("", False),
    ):
        answer = desk.client.get("/healthz", headers={"X-Request-ID": request_id})
        assert (answer.headers["X-Request-ID"] == request_id) is is_kept
