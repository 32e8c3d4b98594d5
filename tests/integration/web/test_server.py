"""`flask_server.py` with real workers: posts by URL and by upload, signals, and what is refused."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from common.post import Media, Post
from tests.support.ports import free_port
from tests.support.processes import python
from tests.support.web.fixtures import ROOT, FlaskServer, Site
from tests.support.workers.driving import alive
from workers.local import local_runner

TEXT = "a cat in the sea 一只猫"


@pytest.fixture(scope="module")
def wanted(site: Site) -> dict[str, Any]:
    """The answer of one process to the same files, without queue, workers and server."""
    media = (Media("image", str(site.media / "a.png")), Media("video", str(site.media / "v.mp4")))
    with local_runner(site.settings) as runner:
        ran = runner.run(Post("p1", TEXT, media))
    features, tags = ran.features, ran.tags
    return {
        "modalities": dict(features.statuses),
        "tags": [(tag.id, tag.name) for tag in tags.tags],
        "scores": tags.scores.tolist(),
    }


def check(answer: requests.Response, wanted: dict[str, Any]) -> None:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["modalities"] == wanted["modalities"]
    assert [(tag["id"], tag["name"]) for tag in found["tags"]] == wanted["tags"]
    scores = {each["id"]: each["score"] for each in found["scores"]}
    assert [scores[i] for i in range(3)] == pytest.approx(wanted["scores"], abs=1e-3)
    assert found["failures"] == {}


def test_urls_give_what_one_process_gives(
    server: FlaskServer, site: Site, wanted: dict[str, Any]
) -> None:
    """JSON with URLs of a loopback media server."""
    body = {
        "post_id": "p1",
        "text": TEXT,
        "images": [f"{site.media_url}/a.png"],
        "videos": [f"{site.media_url}/v.mp4"],
    }
    answer = requests.post(f"{server.url}/v1/tag?scores=1", json=body, timeout=60)
    check(answer, wanted)
    assert {"fetch", "decode", "extract", "fuse", "total"} == set(answer.json()["timings_ms"])


def upload(server: FlaskServer, site: Site) -> requests.Response:
    """A picture, a video and text in one form."""
    with (site.media / "a.png").open("rb") as image, (site.media / "v.mp4").open("rb") as video:
        files = {"images": ("../a.png", image), "videos": ("v.mp4", video)}
        url = f"{server.url}/v1/tag?scores=1"
        return requests.post(url, data={"text": TEXT}, files=files, timeout=60)


def test_uploads_give_what_one_process_gives(
    server: FlaskServer, site: Site, wanted: dict[str, Any]
) -> None:
    """One form; many at once give the same; no upload is left in the spool."""
    check(upload(server, site), wanted)
    with ThreadPoolExecutor(6) as threads:
        for answer in threads.map(lambda _: upload(server, site), range(12)):
            check(answer, wanted)
    assert {path.name for path in server.spool.glob("king-*/*")} == {"lock"}


def test_urls_and_uploads_in_one_form(server: FlaskServer, site: Site) -> None:
    """A line a URL, beside a file; a broken one costs its modality and is named."""
    urls = f"{site.media_url}/none.png\n\n  {site.media_url}/a.png\n"
    with (site.media / "s.wav").open("rb") as sound:
        answer = requests.post(
            f"{server.url}/v1/tag",
            data={"images": urls, "post_id": "mixed"},
            files={"audios": sound},
            timeout=60,
        ).json()
    assert answer["post_id"] == "mixed"
    assert answer["modalities"]["image"] == answer["modalities"]["audio"] == "ok"
    assert answer["failures"]["image"]["message"] == "HTTP 404"


def test_what_is_no_http_is_a_clients_mistake(server: FlaskServer) -> None:
    """Broken requests and clients that hang up leave the server as it was."""
    for raw, status in (
        (b"NONSENSE\r\n\r\n", b" 400 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", b" 400 "),
        (b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
         b"Content-Type: application/json\r\n\r\n{", b" 413 "),
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(raw)
            assert status in connection.recv(4096).split(b"\r\n")[0], raw
    for half in (b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: 50\r\n\r\n{",):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(half)
    assert requests.get(f"{server.url}/healthz", timeout=20).json() == {"status": "ok"}
    assert server.events("http.failed") == []


def test_readiness_before_and_after(server: FlaskServer) -> None:
    """Ready for tagging; for all only with queue and database, whose services no probe starts."""
    tagging = requests.get(f"{server.url}/readyz?only=workers", timeout=20)
    assert (tagging.status_code, tagging.json()["parts"]) == (200, {"workers": "ok"})
    everything = requests.get(f"{server.url}/readyz", timeout=20)
    assert everything.status_code == 503
    assert "not running" in everything.json()["parts"]["broker"]
    assert not (server.log.parent / "embedded").exists()


@pytest.fixture
def own(site: Site) -> Iterator[FlaskServer]:
    """A server that a test may end."""
    made = FlaskServer(site.config, site.folder)
    try:
        yield made
    finally:
        made.close()


def test_sigterm_finishes_what_is_in_flight(own: FlaskServer, site: Site) -> None:
    """Not ready while models load, then ready; SIGTERM: the answer comes, and nothing is left."""
    end = time.monotonic() + 60
    while (answer := own.answer("/readyz?only=workers")) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer.status_code == 503
    assert "loaded" in answer.json()["parts"]["workers"]
    own.until_ready()
    pids = [process.pid for process in own.descendants()]
    assert len(pids) >= 5
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(upload, own, site)
        while own.answer("/readyz?only=workers").json()["in_flight"] == 0:  # type: ignore[union-attr]
            if pending.done():
                pending = thread.submit(upload, own, site)
        assert own.stop() == 0
        assert pending.result().status_code == 200
    assert alive(pids) == []
    assert list(own.spool.glob("king-*")) == []
    assert own.events("http.failed") == []


def test_a_killed_server_leaves_no_worker(own: FlaskServer) -> None:
    """SIGKILL to the process that listens: its server and all workers end by themselves."""
    own.until_ready()
    found = own.descendants()
    own.process.kill()
    own.process.wait(60)
    psutil.wait_procs(found, timeout=60)
    assert alive(process.pid for process in found) == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("flask_server.py", *arguments)


def test_mistakes_are_one_line(site: Site, tmp_path: Path) -> None:
    """Exit 2, naming the key, file or address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        config = ("--config", str(site.config))
        none = tmp_path / "none"
        for arguments, named in (
            (("--config", str(none)), f"{none}: no such file"),
            ((*config, "--set", "http.prot=1"), "did you mean 'port'?"),
            ((*config, "--port", "x"), "http.port: "),
            ((*config, "--port", "70000"), "http.port: "),
            (
                (*config, "--set", f"fusion.bundle={none}"),
                f"fusion.bundle: {none}: no bundle",
            ),
            ((*config, "--port", port), "Address already in use"),
            ((*config, "--host", "203.0.113.1"), "http.host"),
            ((*config, "--prot", "1"), "--help"),
        ):
            done = run(*arguments)
            assert done.returncode == 2, done
            assert named in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert done.stderr.startswith("flask_server.py: ")


def test_what_the_workers_refuse_is_a_mistake_too(site: Site, tmp_path: Path) -> None:
    """A bundle for other features, found out after the start: exit 2, its line is the last."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("bundle.yaml", "labels.json", "model.safetensors"):
        (bundle / name).write_bytes((site.folder / "bundle" / name).read_bytes())
    (bundle / "model.safetensors").write_bytes(b"broken")
    arguments = ["--config", str(site.config), "--port", str(free_port())]
    arguments += ["--set", f"fusion.bundle={bundle}", "--set", f"fetch.spool={tmp_path / 'spool'}"]
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flask_server.py: ")
    assert str(bundle) in last
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "spool").glob("king-*")) == []


def test_help_and_mistakes_load_no_models() -> None:
    """Neither torch nor cv2, flask nor gunicorn is needed to say what is wrong."""
    heavy = ["torch", "cv2", "av", "flask", "gunicorn", "transformers"]
    script = (
        "import sys, flask_server, json\n"
        "try: flask_server.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    )
    for arguments in (["--help"], ["--set", "http.prot=1"]):
        done = python("-c", script, *arguments, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_development_server(site: Site) -> None:
    """``--debug`` serves the same from one process, and ends on Ctrl-C."""
    port = free_port()
    command = [sys.executable, "flask_server.py", "--debug", "--config", str(site.config)]
    command += ["--port", str(port), "--set", f"fetch.spool={site.folder / 'debug'}"]
    with (site.folder / "debug.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            assert time.monotonic() < end
            try:
                url = f"http://127.0.0.1:{port}/healthz"
                assert requests.get(url, timeout=60).json() == {"status": "ok"}
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        pids = [each.pid for each in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert alive(pids) == []
    finally:
        process.kill()
        process.wait()
