"""The page in a real browser: what is uploaded there is shown with its tags."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from tests.support.services import unavailable
from tests.support.web.browser import browser, find_chromium
from tests.support.web.fixtures import FlaskServer, Site


@pytest.fixture
def chromium() -> str:
    """The browser's executable."""
    found = find_chromium()
    if found is None:
        unavailable("no chromium found; apt install chromium")
    return found or ""


def test_an_upload_shows_its_tags(
    server: FlaskServer, site: Site, chromium: str, tmp_path: Path
) -> None:
    """Text, a picture and a video: bars with scores, modalities with reasons, and times.

    Nothing is refused by the page's policy, and a mistake is shown as words, not as markup.
    """
    files = [site.media / "a.png", site.media / "v.mp4"]
    text = "<b>cat</b> in the sea"
    with files[0].open("rb") as image, files[1].open("rb") as video:
        wanted = requests.post(
            f"{server.url}/v1/tag",
            data={"text": text},
            files={"images": image, "videos": video},
            timeout=60,
        ).json()
    broken = tmp_path / "<img src=x onerror=alert(1)>.png"
    broken.write_bytes(b"no picture")
    with browser(chromium, tmp_path / "profile") as page:
        page.open(server.url + "/")
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
        expected = [[tag["name"], f"{tag['score']:.3f}"] for tag in wanted["tags"]]
        assert shown == expected
        assert len(shown) == 3
        width = page.run(
            "document.querySelector('#tags .fill').getBoundingClientRect().width / "
            "document.querySelector('#tags .track').getBoundingClientRect().width"
        )
        assert width == pytest.approx(wanted["tags"][0]["score"], abs=0.02)
        states = page.run(
            "Object.fromEntries([...document.querySelectorAll('#modalities tbody tr')]"
            ".map(row => [row.cells[0].textContent, row.cells[1].textContent]))"
        )
        assert states == wanted["modalities"]
        assert "total" in page.run("document.querySelector('#timings').textContent")
        assert page.complaints == []
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

        page.run("document.querySelector('#clear').click()")
        assert page.run("document.querySelectorAll('#chosen li').length") == 0
        page.choose("#files", [broken])
        page.run("document.querySelector('#send').click()")
        page.until("!document.querySelector('#error').hidden")
        assert "NothingUsable" in page.run("document.querySelector('#error').textContent")
        assert page.run("document.querySelector('#result').hidden")
        assert page.run("document.querySelectorAll('#chosen img[src=x]').length") == 0


def test_every_field_has_its_label(server: FlaskServer, chromium: str, tmp_path: Path) -> None:
    """The page works with a screen reader, by keyboard, and on a narrow screen."""
    with browser(chromium, tmp_path / "profile") as page:
        page.open(server.url + "/", width=360, height=800)
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
