"""`flask_server.py` with real workers: posts by URL and by upload, signals, and what is refused."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

import flask_server
from common.post import Media, Post
from config.settings import Settings
from tests.support import media
from tests.support.ports import free_port
from tests.support.processes import file_server, python
from tests.support.services import RabbitMQServer, wait_until
from tests.support.tiny_models import tiny_bundle, tiny_features
from tests.support.workers.driving import alive, toy_settings
from workers.local import local_runner

TEXT = "a cat in the sea 一只猫"
ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Site:
    """Media on disk and on a loopback server, a bundle, and settings as a file."""

    folder: Path
    media_url: str
    settings: Settings
    config: Path

    @property
    def media(self) -> Path:
        return self.folder / "media"


@pytest.fixture(scope="module")
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

    def metric(self, beginning: str) -> list[float]:
        """The values of the samples whose lines begin so."""
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning)]

    def publishes(self) -> bool:
        """Publish a post; False where the server says to try again, as while it connects."""
        status = requests.post(f"{self.url}/v1/posts/p", timeout=60).status_code
        assert status in (202, 503)
        return status == 202

    def until_ready(self, timeout_s: float = 300) -> "FlaskServer":
        end = time.monotonic() + timeout_s
        while True:
            answer = self.answer("/readyz?only=workers")
            if answer is not None and answer.status_code == 200:
                return self
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.2)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.said.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def descendants(self) -> list[psutil.Process]:
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


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[FlaskServer]:
    """A real server that is ready; shared by the tests that only ask it."""
    made = FlaskServer(site.config, site.folder)
    with contextlib.closing(made):
        yield made.until_ready()


@pytest.fixture(scope="module")
def expected(site: Site) -> dict[str, Any]:
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


def check(answer: requests.Response, expected: dict[str, Any]) -> None:
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["modalities"] == expected["modalities"]
    assert [(tag["id"], tag["name"]) for tag in content["tags"]] == expected["tags"]
    scores = {each["id"]: each["score"] for each in content["scores"]}
    assert [scores[i] for i in range(3)] == pytest.approx(expected["scores"], abs=1e-3)
    assert content["failures"] == {}


def test_urls_give_what_one_process_gives(
    server: FlaskServer, site: Site, expected: dict[str, Any]
) -> None:
    """JSON with URLs of a loopback media server."""
    body = {
        "post_id": "p1",
        "text": TEXT,
        "images": [f"{site.media_url}/a.png"],
        "videos": [f"{site.media_url}/v.mp4"],
    }
    answer = requests.post(f"{server.url}/v1/tag?scores=1", json=body, timeout=60)
    check(answer, expected)
    assert {"fetch", "decode", "extract", "fuse", "total"} == set(answer.json()["timings_ms"])


def upload(server: FlaskServer, site: Site) -> requests.Response:
    """A picture, a video and text in one form."""
    with (site.media / "a.png").open("rb") as image, (site.media / "v.mp4").open("rb") as video:
        files = {"images": ("../a.png", image), "videos": ("v.mp4", video)}
        url = f"{server.url}/v1/tag?scores=1"
        return requests.post(url, data={"text": TEXT}, files=files, timeout=60)


def test_uploads_give_what_one_process_gives(
    server: FlaskServer, site: Site, expected: dict[str, Any]
) -> None:
    """One form; many at once give the same; no upload is left in the spool."""
    check(upload(server, site), expected)
    with ThreadPoolExecutor(6) as threads:
        for answer in threads.map(lambda _: upload(server, site), range(6)):
            check(answer, expected)
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


_POST = b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALVES = {
    "nothing at all": b"",
    "half a line": b"POST /v1/t",
    "half of the headers": _POST,
    "half of a short body": _POST + b'Content-Length: 50\r\n\r\n{"te',
    "half of a long body": _POST + b'Content-Length: 900000\r\n\r\n{"te',
    "half a chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\n50\r\nx",
    "a body that waits to be asked for": _POST
    + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n",
    "a length of many digits": _POST + b"Content-Length: %032d\r\n\r\n{" % 50,
    "half a request after a whole one": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + _POST,
    "an answer that nobody takes": b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("half", HALVES)
def test_half_requests_keep_no_thread(server: FlaskServer, half: str) -> None:
    """More of them than there are threads, and others are answered as before."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            address = ("127.0.0.1", server.port)
            stack.enter_context(socket.create_connection(address, timeout=20)).sendall(HALVES[half])
        for _ in range(3):
            assert requests.get(f"{server.url}/healthz", timeout=20).json() == {"status": "ok"}
        answer = requests.post(f"{server.url}/v1/tag", json={"text": TEXT}, timeout=60)
        assert answer.status_code == 200


def test_clients_that_take_no_answers_are_cut_off(server: FlaskServer) -> None:
    """Their answers would fill the kernel's buffers, and then hold every thread."""
    asked = b"GET /assets/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    with contextlib.ExitStack() as stack:
        ports = set()
        for _ in range(40):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(asked)
            assert connection.recv(1) == b"H"
            ports.add(connection.getsockname()[1])

        def served() -> set[int]:
            held = [c for each in server.descendants() for c in each.net_connections("tcp")]
            return ports & {c.raddr.port for c in held if c.raddr}

        wait_until(lambda: not served(), 60, "all to be cut off")
        assert requests.get(f"{server.url}/healthz", timeout=20).json() == {"status": "ok"}


def test_late_requests_are_ended(server: FlaskServer) -> None:
    """After `http.header_timeout_s` the client gets an answer, and the connection is closed."""
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout=60) as late:
        late.sendall(HALVES["half of the headers"])
        answer = b"".join(iter(lambda: late.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "RequestTimeout"
    with socket.create_connection(address, timeout=60) as silent:
        assert silent.recv(4096) == b""


def test_endless_headers_are_refused(server: FlaskServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(_POST + b"X-Long: " + b"x" * 100_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_readiness_before_and_after(server: FlaskServer) -> None:
    """Ready for tagging; for all only with queue and database, whose services no probe starts."""
    tagging = requests.get(f"{server.url}/readyz?only=workers", timeout=20)
    assert (tagging.status_code, tagging.json()["parts"]) == (200, {"workers": "ok"})
    everything = requests.get(f"{server.url}/readyz", timeout=20)
    assert everything.status_code == 503
    assert "not running" in everything.json()["parts"]["broker"]
    assert not (server.log.parent / "embedded").exists()


def test_metrics_show_every_worker_of_the_one_process(server: FlaskServer) -> None:
    """Scrapes one after another come from the same registry, and see the workers' memory."""
    assert server.metric("insighttag_http_ready") == [1]
    memory = server.metric("insighttag_worker_resident_memory_bytes")
    assert len(memory) == sum(server.metric("insighttag_worker_state")) > 3
    assert min(memory) > 2**20
    scrapes = 'insighttag_http_requests_total{endpoint="metrics"'
    [before] = server.metric(scrapes)
    assert server.metric(scrapes) == [before + 1]


def test_a_killed_server_leaves_no_worker(site: Site) -> None:
    """Not ready while models load. SIGKILL to the process that listens ends all others too."""
    own = FlaskServer(site.config, site.folder)
    with contextlib.closing(own):
        end = time.monotonic() + 60
        while (answer := own.answer("/readyz?only=workers")) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert answer.status_code == 503
        assert "loaded" in answer.json()["parts"]["workers"]
        wait_until(lambda: len(own.descendants()) >= 5, 60, "the workers")
        workers = own.descendants()
        own.process.kill()
        own.process.wait(60)
        psutil.wait_procs(workers, timeout=60)
        assert alive(process.pid for process in workers) == []


def test_mistakes_are_one_line(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
            ((*config, "--set", f"fusion.bundle={none}"), f"fusion.bundle: {none}: no bundle"),
            ((*config, "--port", port), "Address already in use"),
            ((*config, "--host", "203.0.113.1"), "http.host"),
            ((*config, "--prot", "1"), "--help"),
        ):
            assert flask_server.main(arguments) == 2
            said = capsys.readouterr().err
            assert named in said
            assert len(said.splitlines()) == 1
            assert said.startswith("flask_server.py: ")


def test_what_the_workers_refuse_is_a_mistake_too(site: Site, tmp_path: Path) -> None:
    """A broken bundle, found out after the start: exit 2, its line is the last."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("bundle.yaml", "labels.json", "model.safetensors"):
        (bundle / name).write_bytes((site.folder / "bundle" / name).read_bytes())
    (bundle / "model.safetensors").write_bytes(b"broken")
    arguments = ["--config", str(site.config), "--port", str(free_port())]
    arguments += ["--set", f"fusion.bundle={bundle}", "--set", f"fetch.spool={tmp_path / 'spool'}"]
    done = python("flask_server.py", *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("flask_server.py: ")
    assert str(bundle) in last
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "spool").glob("king-*")) == []


@pytest.fixture(scope="module")
def publisher(site: Site, _rabbitmq_session: RabbitMQServer) -> Iterator[FlaskServer]:
    """A server on RabbitMQ that begins to load; shared, since loading takes ten CPU-seconds."""
    _rabbitmq_session.start()
    # A handshake that a crowded machine is slow to answer would be another error than the alarm.
    broker = (
        f"broker.url={_rabbitmq_session.url}",
        f"broker.queue={site.folder.name}",
        "broker.socket_timeout_s=20",
    )
    made = FlaskServer(site.config, site.folder, *broker, "store.url=mongodb://127.0.0.1:1/")
    try:
        yield made
    finally:
        made.close()


@pytest.mark.rabbitmq
def test_workers_that_cannot_load_now_are_started_again(publisher: FlaskServer) -> None:
    """Killed while loading, as often as ends a pool that never worked: said, and tried anew."""
    while not publisher.events("http.workers_failed"):
        assert publisher.process.poll() is None, publisher.said
        for each in publisher.descendants():
            with contextlib.suppress(psutil.Error):
                if " ".join(each.cmdline()).startswith("insighttag: extract"):
                    each.kill()
        time.sleep(0.05)
    assert "failed to start" in publisher.events("http.workers_failed")[0]["reason"]
    publisher.until_ready()
    answer = requests.post(f"{publisher.url}/v1/tag", json={"text": TEXT}, timeout=60)
    assert answer.status_code == 200


@pytest.mark.rabbitmq
def test_an_alarm_silences_nobody(publisher: FlaskServer, rabbitmq: RabbitMQServer) -> None:
    """More posts than there are threads: 503 and when to try again, while others are answered."""
    url = publisher.url
    wait_until(lambda: publisher.answer("/healthz") is not None, 120, "the server")
    wait_until(publisher.publishes, 60, "a broker that takes posts")
    with rabbitmq.memory_alarm(), ThreadPoolExecutor(34) as threads:
        pending = [
            threads.submit(requests.post, f"{url}/v1/posts/p{i}", timeout=120) for i in range(34)
        ]
        while wait(pending, timeout=0.2).not_done:
            assert requests.get(f"{url}/healthz", timeout=30).json() == {"status": "ok"}
    for answer in [each.result() for each in pending]:
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (503, "PublishRefused"), error["message"]
        assert "alarm" in error["message"]
        assert int(answer.headers["Retry-After"]) > 0
    wait_until(publisher.publishes, 60, "a broker that takes posts")
    assert publisher.stop() == 0


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


def test_sigterm_finishes_what_is_in_flight(server: FlaskServer, site: Site) -> None:
    """SIGTERM: the answer comes, and nothing is left. The last test of the shared server."""
    pids = [process.pid for process in server.descendants()]
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(upload, server, site)
        while server.answer("/readyz?only=workers").json()["in_flight"] == 0:  # type: ignore[union-attr]
            if pending.done():
                pending = thread.submit(upload, server, site)
        assert server.stop() == 0
        assert pending.result().status_code == 200
    assert alive(pids) == []
    assert list(server.spool.glob("king-*")) == []
    assert server.events("http.failed") == []
