"""The page in a real browser: what is uploaded there is shown with its tags."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from werkzeug.serving import make_server

from common.post import Failure
from tests.support import media
from tests.support.fakes.pool import Answer, FakePool, default_answer
from tests.support.services import unavailable
from tests.support.web.browser import browser, find_chromium
from tests.support.web.fixtures import desk_settings, make_desk
from workers.protocol import DecodeTask, Task


@pytest.fixture
def chromium() -> str:
    program = find_chromium()
    if program is None:
        unavailable("no chromium found; apt install chromium")
    return program or ""


def answer(task: Task) -> Answer:
    if isinstance(task, DecodeTask) and Path(task.path).read_bytes() == b"no picture":
        return Failure("decode", "MediaError", "is no picture")
    return default_answer(task)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The application over workers in memory, on a port of its own."""
    (tmp_path / "downloads").mkdir()
    for desk in make_desk(desk_settings(tmp_path), FakePool(tmp_path / "downloads", answer)):
        desk.runner.start()
        server = make_server("127.0.0.1", 0, desk.client.application, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_upload_shows_its_tags(url: str, chromium: str, tmp_path: Path) -> None:
    """Text, a picture and a video: bars with scores, modalities with reasons, and times.

    Nothing is refused by the page's policy, and a mistake is shown as words, not as markup.
    """
    files = [tmp_path / "a.png", tmp_path / "v.mp4"]
    media.write_png(files[0], media.quadrants(90, 70))
    files[1].write_bytes(b"a video")
    text = "<b>cat</b> in the sea"
    with files[0].open("rb") as image, files[1].open("rb") as video:
        uploads = {"images": image, "videos": video}
        expected = requests.post(
            f"{url}/v1/tag", data={"text": text}, files=uploads, timeout=60
        ).json()
    broken = tmp_path / "<img src=x onerror=alert(1)>.png"
    broken.write_bytes(b"no picture")
    with browser(chromium, tmp_path / "profile") as page:
        page.open(url + "/")
        page.until("document.querySelector('#server')?.textContent.startsWith('Ready')")
        page.run(f"document.querySelector('#text').value = {text!r}")
        page.choose("#files", files)
        page.until("document.querySelectorAll('#chosen li').length === 2")
        page.run("document.querySelector('#send').click()")
        page.until("!document.querySelector('#result').hidden")
        shown = page.run(
            "[...document.querySelectorAll('#tags li')].map(row => "
            "[row.children[0].textContent, row.children[2].textContent])"
        )
        assert shown == [[tag["name"], f"{tag['score']:.3f}"] for tag in expected["tags"]]
        assert shown == [["sport", "0.900"]]
        width = page.run(
            "document.querySelector('#tags .fill').getBoundingClientRect().width / "
            "document.querySelector('#tags .track').getBoundingClientRect().width"
        )
        assert width == pytest.approx(0.9, abs=0.02)
        marks = page.run(
            "[...document.querySelectorAll('#scores li')].map(row => "
            "[row.title, row.querySelector('.mark').style.left, row.className])"
        )
        assert marks == [
            ["given from 0.500 on", "50%", ""],
            ["given from 0.125 on", "12.5%", "below"],
        ]
        assert page.run("document.querySelector('#tags .mark').style.left") == "50%"
        states = page.run(
            "Object.fromEntries([...document.querySelectorAll('#modalities tbody tr')]"
            ".map(row => [row.cells[0].textContent, row.cells[1].textContent]))"
        )
        assert states == expected["modalities"]
        assert "total" in page.run("document.querySelector('#timings').textContent")
        assert page.complaints == []

        page.run("document.querySelector('#clear').click()")
        assert page.run("document.querySelectorAll('#chosen li').length") == 0
        page.choose("#files", [broken])
        page.run("document.querySelector('#send').click()")
        page.until("!document.querySelector('#error').hidden")
        assert "NothingUsable" in page.run("document.querySelector('#error').textContent")
        assert page.run("document.querySelector('#result').hidden")
        assert page.run("document.querySelectorAll('#chosen img[src=x]').length") == 0


def test_every_field_has_its_label(url: str, chromium: str, tmp_path: Path) -> None:
    """The page works with a screen reader, by keyboard, and on a narrow screen."""
    with browser(chromium, tmp_path / "profile") as page:
        page.open(url + "/", width=360, height=800)
        page.until("document.readyState === 'complete'")
        nameless = page.run(
            "[...document.querySelectorAll('input, textarea, button')]"
            ".filter(e => !e.textContent.trim() && !(e.labels && e.labels.length))"
            ".map(e => e.id)"
        )
        assert nameless == []
        assert page.run("document.documentElement.lang") == "en"
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        colours = []
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]
