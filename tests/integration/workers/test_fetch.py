"""Downloads from a real server: limits, answers of every kind, and errors."""

import hashlib
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from common.errors import FetchRefused, FetchRetryable
from common.post import Media
from config.settings import FetchSettings
from tests.support.ports import free_port
from tests.support.workers.fetching import fetch, get, refused, retryable, settings_of
from tests.support.workers.web import BODY, Web, web_server
from workers.fetch import Fetcher, seconds_of


@pytest.mark.parametrize(
    "path",
    [
        *("/ok", "/chunked", "/gzip", "/stray", "/deflate"),
        *("/redirect/2", "/ok/a b", "/ok/猫.png", "/to//ok/猫", "/latin", "/interim"),
    ],
)
def test_body_arrives_whole(web: Web, tmp_path: Path, path: str) -> None:
    """With a length, in chunks, packed unasked, behind redirects, under any name: the bytes."""
    assert get(web.url(path), tmp_path) == BODY


def test_the_body_of_a_redirect_is_not_read(web: Web, tmp_path: Path) -> None:
    """It may be endless, or a bomb."""
    assert get(web.url("/aside"), tmp_path, total_timeout_s=20) == BODY


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_is_checked_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Https works through the guarded connection, and only with a certificate that is trusted."""
    pair = [str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", pair[0], "-out", pair[1]], check=True, capture_output=True)
    with web_server() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair[1], pair[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = f"https://localhost:{server.server_port}/ok"
        spool = tmp_path / "spool"
        spool.mkdir()
        assert refused(url, spool) == "the TLS connection cannot be trusted or agreed on"
        monkeypatch.setattr("certifi.where", lambda: pair[1])
        fetcher = Fetcher(settings_of())
        assert fetcher.fetch(Media("image", url), spool / "a").size_bytes == len(BODY)
        with pytest.raises(FetchRefused, match="TLS"):
            fetcher.fetch(Media("image", url.replace("localhost", "127.0.0.1")), spool / "b")
        fetcher.close()


def test_requests_are_plain(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the environment, no cookie of an earlier answer, nothing packed is asked for."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    fetcher = Fetcher(settings_of(user_agent="Test/9"))
    before = web.connections
    for name in ("a", "b"):
        fetcher.fetch(Media("image", web.url("/ok")), tmp_path / name)
    fetcher.close()
    sent = web.headers[-1]
    assert sent["User-Agent"] == "Test/9"
    assert sent["Accept-Encoding"] == "identity"
    assert "Cookie" not in sent
    assert web.connections == before + 1, "the connection was not kept alive"


def test_credentials_of_a_url_are_used_and_never_told(web: Web, tmp_path: Path) -> None:
    url = web.url("/ok").replace("http://", "http://user:hunter2@")
    assert get(url, tmp_path) == BODY
    assert web.headers[-1]["Authorization"].startswith("Basic ")
    for path in ("/status/404", "/reset", "/short", "/html", "/to/ftp://u:hunter2@h/"):
        url = web.url(path).replace("http://", "http://user:hunter2@")
        with pytest.raises((FetchRefused, FetchRetryable)) as caught:
            get(url, tmp_path)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/status/404", "HTTP 404"),
        ("/status/403", "HTTP 403"),
        ("/status/204", "HTTP 204"),
        ("/html", "content type text/html is not media"),
        ("/empty", "the answer is empty"),
        ("/redirect/9", "more than 5 redirects"),
        ("/brotli", "content encoding 'br' cannot be unpacked here"),
        ("/badzip", "content encoding gzip: the body is broken"),
        ("/to/file:///etc/passwd", "scheme 'file' is not http or https"),
        ("/to/gopher://h/", "scheme 'gopher' is not http or https"),
    ],
)
def test_what_cannot_be_had(web: Web, tmp_path: Path, path: str, reason: str) -> None:
    """Each permanent failure has its own line, and is not tried twice."""
    web.paths.clear()
    assert refused(web.url(path), tmp_path) == reason
    assert web.paths.count(path) == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/status/500", "HTTP 500"),
        ("/status/503", "HTTP 503"),
        ("/status/429", "HTTP 429"),
        *((f"/status/{code}", f"HTTP {code}") for code in (202, 408, 409, 421, 423, 425, 520)),
        ("/reset", "the connection broke"),
        ("/short", "the connection broke"),
        ("/lengths", "the answer is no proper HTTP"),
        ("/badchunk", "the answer is no proper HTTP"),
        ("/cutzip", "content encoding gzip: the body is cut short"),
    ],
)
def test_what_may_pass(web: Web, tmp_path: Path, path: str, reason: str) -> None:
    """Passing failures are tried twice, then reported as retryable."""
    web.paths.clear()
    assert retryable(web.url(path), tmp_path) == reason
    assert web.paths.count(path) == 2


def test_second_try_helps(web: Web, tmp_path: Path) -> None:
    assert get(web.url("/flaky"), tmp_path) == BODY


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "//h/a", "ftp://h/a", "file:///etc/passwd", "data:image/png;base64,AA"),
        *("http://", "http:///a", "http://[::1", "http://h b/", "http://h/\r\nX: y"),
        *("http://h:99999999/", f"http://{'a' * 300}/", f"http://h/{'a' * 9000}"),
        "http://ex\x00ample/",
    ],
)
def test_what_is_no_url(tmp_path: Path, url: str) -> None:
    """The error is one line, and permanent (for a host name it may be retryable)."""
    with pytest.raises((FetchRefused, FetchRetryable)) as caught:
        get(url, tmp_path, allow_private_hosts=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 120


def test_told_size_is_believed_when_it_is_too_large(web: Web, tmp_path: Path) -> None:
    """A length above the limit is refused before a byte is read."""
    reason = refused(web.url("/ok"), tmp_path, max_bytes=len(BODY) - 1)
    assert reason == f"larger than fetch.max_bytes ({len(BODY) - 1})"
    assert get(web.url("/ok"), tmp_path, max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize("path", ["/endless", "/lies", "/bomb", "/gzip"])
def test_size_is_counted_and_not_believed(web: Web, tmp_path: Path, path: str) -> None:
    """Without a length, in chunks, or unpacked: the limit holds."""
    assert refused(web.url(path), tmp_path, max_bytes=5000) == "larger than fetch.max_bytes (5000)"


def test_slow_answer(web: Web, tmp_path: Path) -> None:
    assert retryable(web.url("/slow/3"), tmp_path, read_timeout_s=0.3) == "timed out after 0.3 s"


@pytest.mark.parametrize("path", ["/drip", "/driphead", "/hollow"])
def test_whole_time_is_bounded(web: Web, tmp_path: Path, path: str) -> None:
    """A server that sends a byte now and then cannot hold a connection, headers included.

    Nor can one that sends packed nothing at full speed, without end.
    """
    started = time.monotonic()
    assert retryable(web.url(path), tmp_path, total_timeout_s=0.7) == "timed out after 0.7 s"
    assert time.monotonic() - started < 8, "the server takes ten seconds"


def test_nothing_listens(tmp_path: Path) -> None:
    assert retryable(f"http://127.0.0.1:{free_port()}/a", tmp_path) == "Connection refused"


def test_name_that_does_not_exist(tmp_path: Path) -> None:
    reason = retryable("http://no-such-host.invalid/a", tmp_path, allow_private_hosts=False)
    assert reason == "the host name cannot be resolved"


@pytest.mark.parametrize("scheme", ["https://", "//"])
def test_plain_text_behind_https(web: Web, tmp_path: Path, scheme: str) -> None:
    """TLS that cannot be agreed on is permanent, in one line; without a scheme TLS is spoken."""
    url = web.url("/ok").replace("http://", scheme)
    assert refused(url, tmp_path) == "the TLS connection cannot be trusted or agreed on"


def test_threads_do_not_share_a_clock(web: Web, tmp_path: Path) -> None:
    results: dict[str, Any] = {}

    def work(name: str, path: str, total_s: float) -> None:
        fetcher = Fetcher(settings_of(total_timeout_s=total_s))
        try:
            results[name] = fetcher.fetch(Media("image", web.url(path)), tmp_path / name).size_bytes
        except FetchRetryable as error:
            results[name] = str(error)
        fetcher.close()

    threads = [
        threading.Thread(target=work, args=("slow", "/drip", 0.5)),
        threading.Thread(target=work, args=("fine", "/slow/1", 30)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"slow": "timed out after 0.5 s", "fine": len(BODY)}


SETTINGS = FetchSettings(allow_private_hosts=True, total_timeout_s=5)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def test_content_is_hashed_as_it_comes(web: Web, tmp_path: Path) -> None:
    """The hash is that of the file, also of one that was packed on the way."""
    for name in ("ok", "gzip", "chunked"):
        fetched = fetch(Media("image", web.url(f"/{name}")), SETTINGS, tmp_path, name)
        assert fetched.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_the_content_counts_not_its_declared_type(web: Web, tmp_path: Path) -> None:
    """A picture that is sent as text/html is a picture."""
    fetched = fetch(Media("image", web.url("/mislabelled/")), SETTINGS, tmp_path, "a")
    assert Path(fetched.path).read_bytes().startswith(b"\x89PNG")


def test_who_waits_longer_asks_for_one_try(web: Web, tmp_path: Path) -> None:
    """With one try there is one request, and the error tells what a wait needs to know."""
    fetcher = Fetcher(SETTINGS)
    before = len(web.paths)
    with pytest.raises(FetchRetryable, match="HTTP 429") as caught:
        fetcher.fetch(Media("image", web.url("/status/429")), tmp_path / "a", tries=1)
    assert len(web.paths) == before + 1
    assert (caught.value.retry_after_s, caught.value.unreachable) == (None, False)
    with pytest.raises(FetchRetryable) as caught:
        fetcher.fetch(Media("image", "http://127.0.0.1:1/x"), tmp_path / "a", tries=1)
    assert caught.value.unreachable
    fetcher.close()


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("7", 7, 7), (" 0 ", 0, 0), ("Fri, 01 Jan 2010 00:00:00 GMT", 0, 0), ("in 100 s", 60, 101)],
)
def test_retry_after_is_seconds_or_a_date(text: str, low: float, high: float) -> None:
    """Both forms of the header; a date that is over is no wait."""
    if text == "in 100 s":
        text = formatdate(time.time() + 100, usegmt=True)
    seconds = seconds_of(text)
    assert seconds is not None
    assert low <= seconds <= high


@pytest.mark.parametrize("text", ["", "soon", "-5", "1.5", "\u0663"])
def test_retry_after_of_another_form_is_none(text: str) -> None:
    assert seconds_of(text) is None
