"""Checks that the pages of all reports keep, in a real browser."""

from pathlib import Path

from tests.support.services import unavailable
from tests.support.web.browser import browser, find_chromium

# A fifth of the first training report's height on a desk.
MOST_PIXELS = 2880


def assert_readable(report: Path, profile: Path) -> None:
    """Short before details unfold, never wider than a phone, no fault for axe, no request."""
    executable = find_chromium()
    if executable is None:
        unavailable("no chromium found; apt install chromium")
    with browser(executable or "", profile) as page:
        page.open(report.as_uri(), width=1440)
        page.until("document.readyState === 'complete'")
        root = "document.documentElement"
        assert page.run(f"{root}.scrollHeight") <= MOST_PIXELS
        page.resize(390, 844)
        assert page.run(f"{root}.scrollWidth") <= 390
        seen = "[...document.querySelectorAll('figure > svg')].filter((c) => c.checkVisibility())"
        scales = page.run(f"{seen}.map((c) => c.getBoundingClientRect().width / 340)")
        assert scales
        assert min(scales) > 0.9, "the text of charts is never smaller than 10 pixels"
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        assert page.run(f"{root}.scrollWidth") <= 390
        assert page.faults() == []
        page.scheme("dark")
        assert page.faults(["color-contrast"]) == []
        addresses = [url for url in page.requests if not url.startswith("data:")]
        assert addresses == [report.as_uri()]
        assert page.complaints == []
