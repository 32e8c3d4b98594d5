"""Progress on a terminal of 80 columns, without a terminal, and while a server is waited for."""

import io
import re
import time

import pytest
from rich.console import Console

from common.progress import Bar, on_console, told_if_long

NOTE = "12,345 there, 678 failed, 27.7/s"


def drawn(width: int) -> str:
    """Return a bar with a long note as a terminal of a width gets it."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bars = on_console(console)
    Bar(bars, bars.add_task("image features", total=123_456, note="")).update(98_765, NOTE)
    console.print(bars.get_renderable())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip("\n")


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_bar_is_one_row_and_its_numbers_are_whole(width: int) -> None:
    row = drawn(width)
    assert "\n" not in row
    assert len(row) <= width
    assert "image features" in row
    assert "98765/123456" in row
    assert re.search(r"0:00:00 +-:--:--", row)
    assert (NOTE in row) == (width >= 120)
    assert NOTE[:10] in row


def test_without_a_terminal_a_line_has_count_rate_and_time_left() -> None:
    """It is one line, however long it is."""
    console = Console(file=io.StringIO(), width=80)
    bars = on_console(console)
    bar = Bar(bars, bars.add_task("posts", total=1000, note=""), line_every_s=0)
    for done in (100, 200, 300):
        bar.update(done, NOTE)
    last = console.file.getvalue().splitlines()[-1]  # type: ignore[attr-defined]
    assert re.fullmatch(rf"posts: 300 of 1,000, [\d.e+]+/s, \d:\d\d:\d\d left, {NOTE}", last)


def test_a_block_is_announced_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    with told_if_long("waiting", after_s=60):
        pass
    assert said.getvalue() == ""
    with told_if_long("waiting for it, at most 5 s", after_s=0.01):
        until = time.monotonic() + 10
        while not said.getvalue() and time.monotonic() < until:
            time.sleep(0.001)
    assert said.getvalue() == "waiting for it, at most 5 s\n"
