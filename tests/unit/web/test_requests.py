"""Mistakes of clients: each has its status and its reason, and shows no internals."""

import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from common.errors import NothingUsable
from common.post import Failure, Media, Post
from config.settings import HttpSettings
from tests.support.fakes.pool import FakePool, default_answer
from tests.support.web.fixtures import Desk, desk_settings, make_desk, no_traceback
from web.guard import ApiError
from web.reading import Uploads, read_post
from workers.protocol import DecodeTask, FetchTask, Task

JSON = {"content_type": "application/json"}
MULTIPART = {"content_type": "multipart/form-data"}
FORM = "multipart/form-data; boundary=xx"


def form(*parts: bytes, end: bytes = b"--xx--\r\n") -> dict[str, Any]:
    body = b"".join(b"--xx\r\nContent-Disposition: form-data; " + part for part in parts)
    return {"data": body + end, "content_type": FORM}


def body(content: Any) -> dict[str, Any]:
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    return {"data": data, **JSON}


def file(name: str = "a.png", content: bytes = b"x") -> tuple[io.BytesIO, str]:
    return io.BytesIO(content), name


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no body": ({**JSON}, 400, "the body is empty"),
    "half a JSON": (body("{"), 400, "not JSON"),
    "not UTF-8": (body(b'{"text": "\xff"}'), 400, "not UTF-8 (byte 10)"),
    "NaN": (body('{"text": NaN}'), 400, "NaN is not JSON"),
    "nested without end": (body("[" * 5000), 400, "not JSON"),
    "a list": (body([]), 400, "must be a JSON object"),
    "a word": (body('"text"'), 400, "must be a JSON object"),
    "an unknown key": (body({"txt": "x"}), 400, "unknown key; did you mean 'text'?"),
    "a number as text": (body({"text": 5}), 400, "text: Input should be a valid string"),
    "a text as list": (body({"images": "http://h/a.png"}), 400, "images: "),
    "a number as URL": (body({"videos": [7]}), 400, "videos.0: "),
    "a path": (body({"images": ["/etc/passwd"]}), 400, "images.0: must be an http:// or"),
    "a relative path": (body({"images": ["a.png"]}), 400, "images.0: must be an http"),
    "a file URL": (body({"audios": ["file:///etc/passwd"]}), 400, "audios.0: must be an http"),
    "another scheme": (body({"videos": ["ftp://h/v.mp4"]}), 400, "videos.0: must be an http"),
    "a URL without host": (body({"images": ["http:///a.png"]}), 400, "images.0: must be an http"),
    "a URL with a line break": (body({"images": ["http://h/a\nb"]}), 400, "images.0: must be"),
    "a broken host": (body({"images": ["http://[::1/a"]}), 400, "images.0: must be an http"),
    "a very long URL": (body({"images": ["http://h/" + "a" * 8200]}), 400, "over 8192 characters"),
    "an empty ID": (body({"post_id": " ", "text": "x"}), 400, "post_id: the post_id is empty"),
    "a long ID": (body({"post_id": "x" * 513, "text": "x"}), 400, "at most 512"),
    "a control character": (body({"post_id": "a\x07", "text": "x"}), 400, "U+0007"),
    "nothing to tag": (body({}), 422, "no text and no media"),
    "only spaces": (body({"text": " \n"}), 422, "no text and no media"),
    "a long text": (body({"text": "x" * 1001}), 413, "over 1000 characters"),
    "many URLs": (body({"images": ["http://h/a"] * 5}), 413, "more than 4 files and URLs"),
    "a large JSON": (body({"text": "x" * 11_000}), 413, "http.max_json_bytes"),
    "another type": ({"data": "x", "content_type": "text/plain"}, 415, "send application/json"),
    "no type": ({"data": "x"}, 415, "the content type is none"),
    "a web form": (
        {"data": "text=a", "content_type": "application/x-www-form-urlencoded"},
        415,
        "send application/json or multipart/form-data",
    ),
    "no boundary": ({"data": "x", "content_type": "multipart/form-data"}, 400, "Missing boundary"),
    "an odd boundary": (
        {"data": "x", "content_type": "multipart/form-data; boundary=é"},
        400,
        "the form cannot be read",
    ),
    "no form at all": ({"data": "hello", "content_type": FORM}, 400, "the form cannot be read"),
    "half a form": (form(b'name="text"\r\n\r\nhello', end=b""), 400, "the form cannot be read"),
    "half a file": (
        form(b'name="images"; filename="a.png"\r\n\r\n\x89PNG', end=b""),
        400,
        "the form cannot be read",
    ),
    "an unknown field": ({"data": {"image": file()}}, 400, "'image' is not a field"),
    "a file as text": ({"data": {"text": file()}}, 400, "text must be text, not a file"),
    "a path in a form": (
        {"data": {"images": "/etc/passwd"}, **MULTIPART},
        400,
        "images: must be an http",
    ),
    "an empty form": ({"data": {"text": ""}, **MULTIPART}, 422, "no text and no media"),
    "many files": ({"data": {"images": [file() for _ in range(5)]}}, 413, "http.max_files"),
    "many parts": ({"data": {"images": ["http://h/a"] * 40}, **MULTIPART}, 413, "too large"),
    "a large file": ({"data": {"images": file(content=b"x" * 200_000)}}, 413, "max_body_bytes"),
    "a large field": ({"data": {"text": "x" * 50_000}, **MULTIPART}, 413, "too large"),
    "a bad option": (
        {**body({"text": "x"}), "query_string": "scores=maybe"},
        400,
        "must be 0 or 1, got 'maybe'",
    ),
    "another site": (
        {**body({"text": "x"}), "headers": {"Origin": "http://evil.example"}},
        403,
        "from another site",
    ),
    "an origin that is no URL": (
        {**body({"text": "x"}), "headers": {"Origin": "http://[x"}},
        400,
        "Origin",
    ),
    "another site's form": (
        {"data": {"text": "x"}, "headers": {"Sec-Fetch-Site": "cross-site"}},
        403,
        "from another site",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(desk: Desk, name: str) -> None:
    options, status, reason = MISTAKES[name]
    response = desk.client.post("/v1/tag", **options)
    assert response.status_code == status, response.text
    assert reason in response.json["error"]["message"], response.text
    assert response.json["error"]["type"]
    assert response.headers["X-Request-ID"]
    assert no_traceback(response.text)
    assert desk.pool.submitted == []


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("LocalHost.", 200),
        ("desk:8080", 200),
        ("tags.example.org", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("sub.tags.example.org", 403),
        ("[::1", 403),
    ],
)
def test_only_our_names_are_answered(tmp_path: Path, host: str, status: int) -> None:
    """A foreign site that points its name at this machine reads nothing and sends nothing."""
    (tmp_path / "downloads").mkdir()
    settings = desk_settings(tmp_path, host="desk", allowed_hosts=["Tags.example.org"])
    for desk in make_desk(settings, FakePool(tmp_path / "downloads")):
        desk.runner.start()
        headers = {"Host": host}
        read = [desk.client.get(path, headers=headers) for path in ("/healthz", "/v1/labels", "/")]
        sent = desk.client.post("/v1/tag", json={"text": "x"}, headers=headers)
        assert [answer.status_code for answer in (*read, sent)] == [status] * 4
        assert (desk.pool.submitted == []) == (status == 403)
        if status == 403:
            assert "http.allowed_hosts" in sent.json["error"]["message"]


def test_routes_that_are_not(desk: Desk) -> None:
    for method, path, status in (
        ("get", "/v2/tag", 404),
        ("get", "/v1/posts/", 404),
        ("get", "/assets/../app.py", 404),
        ("get", "/assets/none.js", 404),
        ("get", "/v1/tag", 405),
        ("put", "/v1/tag", 405),
        ("delete", "/v1/posts/p1", 405),
        ("post", "/healthz", 405),
    ):
        response = getattr(desk.client, method)(path)
        assert response.status_code == status, path
        assert response.json["error"]["type"] in ("NotFound", "MethodNotAllowed")
        assert ("Allow" in response.headers) == (status == 405)


def test_bodies_of_unknown_length_are_bounded_too(desk: Desk) -> None:
    """Without a length the limit is enforced while reading, for JSON as for forms."""
    for content_type, size in (("application/json", 20_000), (FORM, 200_000)):
        start = b'--xx\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        data = b"[" * size if content_type == "application/json" else start + b"x" * size
        builder = EnvironBuilder("/v1/tag", method="POST", input_stream=io.BytesIO(data))
        environ = builder.get_environ()
        del environ["CONTENT_LENGTH"]
        environ.update(
            {
                "HTTP_TRANSFER_ENCODING": "chunked",
                "wsgi.input_terminated": True,
                "CONTENT_TYPE": content_type,
            }
        )
        response = desk.client.open(environ_overrides=environ, base_url="http://localhost")
        assert response.status_code == 413, response.text
        assert response.json["error"]["type"] == "TooLarge"


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    """A body that stops half-way is given up in time: 408, and its files are gone."""
    ours, theirs = socket.socketpair()
    uploads = Uploads(tmp_path / "spool", max_files=4)
    start = b'--xx\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n\x89PNG'
    theirs.sendall(start)
    environ = EnvironBuilder("/v1/tag", method="POST", content_type=FORM).get_environ()
    environ.update(
        {
            "wsgi.input": ours.makefile("rb"),
            "wsgi.input_terminated": True,
            "CONTENT_LENGTH": "5000",
            "gunicorn.socket": ours,
        }
    )
    began = time.monotonic()
    with pytest.raises(ApiError) as caught, uploads.box() as box:
        read_post(Request(environ), box, HttpSettings(body_timeout_s=0.3))
    assert caught.value.status == 408
    assert "http.body_timeout_s" in caught.value.message
    assert 0.3 <= time.monotonic() - began < 30
    assert [path.name for path in uploads.folder.iterdir()] == ["lock"]
    environ["wsgi.input"].close()
    ours.close()
    theirs.close()
    uploads.close()


def test_a_client_never_names_a_file_here(desk: Desk) -> None:
    """An upload lies in the spool under a name of ours until it is read."""
    seen: list[str] = []

    def answer(task: Task) -> Any:
        if isinstance(task, DecodeTask):
            seen.append(task.path)
            assert Path(task.path).read_bytes() == b"picture"
        return default_answer(task)

    desk.pool._answer = answer
    names = ("../../../etc/passwd", "/etc/passwd", "a\x00b", "ü" * 300)
    for name in names:
        response = desk.client.post("/v1/tag", data={"images": file(name, b"picture")})
        assert response.status_code == 200, response.text
        assert response.json["modalities"]["image"] == "ok"
    assert len(seen) == len(names)
    assert {Path(path).parent for path in seen} == {desk.uploads.folder}
    assert not any(Path(path).exists() for path in seen)


def test_local_paths_do_not_get_past_the_runner_either(desk: Desk, tmp_path: Path) -> None:
    """Should a path get through the reading of a request, the runner still reads none of it."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    lock = desk.uploads.folder / "lock"
    for source in (str(secret), "/etc/passwd", f"{desk.uploads.folder}/../../secret.png"):
        future = desk.runner.submit(Post("p", media=(Media("image", source),)))
        with pytest.raises(NothingUsable, match="not allowed as a source of media"):
            future.result(10)
    assert lock.exists()
    assert not any(isinstance(task, (DecodeTask, FetchTask)) for task in desk.pool.submitted)


def test_nothing_usable_has_its_reasons(desk: Desk) -> None:
    """422 says for each modality what was wrong with it, without our paths."""

    def answer(task: Task) -> Any:
        if isinstance(task, DecodeTask):
            return Failure("decode", "MediaError", f"{task.path}: is not a {task.kind}")
        if isinstance(task, FetchTask):
            return Failure("fetch", "FetchRefused", "HTTP 404")
        return default_answer(task)

    desk.pool._answer = answer
    response = desk.client.post("/v1/tag", data={"images": file(), "videos": ["http://h/v.mp4"]})
    assert response.status_code == 422
    error = response.json["error"]
    assert error["type"] == "NothingUsable"
    assert error["reasons"]["video"] == "HTTP 404"
    assert error["reasons"]["image"].endswith("is not a image")
    assert no_traceback(response.text)
    failed = desk.client.post("/v1/tag", data={"images": file(), "text": "words"})
    assert failed.status_code == 200
    assert failed.json["failures"]["image"]["type"] == "MediaError"
    assert no_traceback(failed.json["failures"]["image"]["message"])


def test_busy_and_late(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    settings = desk_settings(tmp_path, posts=1, deadline_s=0.8, retry_after_s=7)
    pool = FakePool(tmp_path / "downloads", lambda task: None)
    for desk in make_desk(settings, pool):
        desk.runner.start()
        pool_of_one = ThreadPoolExecutor(1)
        client = desk.client.application.test_client()
        slow = pool_of_one.submit(client.post, "/v1/tag", json={"text": "a"})
        while desk.runner.in_flight == 0:
            time.sleep(0.01)
        busy = desk.client.post("/v1/tag", json={"text": "b"})
        assert (busy.status_code, busy.headers["Retry-After"]) == (503, "7")
        assert busy.json["error"]["type"] == "Busy"
        late = slow.result(10)
        assert late.status_code == 504
        assert late.json["error"]["type"] == "DeadlineExceeded"
        assert desk.runner.in_flight == 0


def test_a_client_that_hangs_up_takes_its_post_along(desk: Desk) -> None:
    """Nobody will read the answer: the work is broken off long before its deadline."""
    desk.pool._answer = lambda _task: None
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as thread:
        client = desk.client.application.test_client()
        pending = thread.submit(
            client.post,
            "/v1/tag",
            data={"images": file()},
            environ_overrides={"gunicorn.socket": ours},
        )
        while desk.runner.in_flight == 0:
            time.sleep(0.01)
        time.sleep(0.7)
        assert not pending.done()  # it waits while somebody is there
        theirs.close()
        assert pending.result(3).json["error"]["type"] == "ClientClosedRequest"
    while desk.runner.in_flight:
        time.sleep(0.01)
    ours.close()


def test_a_mistake_of_ours_is_not_shown(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 with the request's ID; the traceback is in the log alone."""
    import web.app as module

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(module, "tagged", broken)
    response = desk.client.post("/v1/tag", json={"text": "x"}, headers={"X-Request-ID": "mine-1"})
    assert response.status_code == 500
    assert response.headers["X-Request-ID"] == "mine-1"
    assert "mine-1" in response.json["error"]["message"]
    assert "secret" not in response.text
    assert "ZeroDivisionError" in capsys.readouterr().out
