"""Tables at terminals that are narrower than they are."""

import sys

import pytest

from common.tables import print_table

POST = "64b000000000000000000001"
WORKER = {
    "name": "extract-0",
    "device": "cuda:0",
    "extractors": "video image audio text ocr",
    "state": "starting",
    "pid": "2122300",
    "held": "0",
    "done": "60",
    "deaths": "0",
    "rss_mb": "1794.8",
}


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have standard output a terminal of eighty columns, for the rest of a test."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_words_of_the_workers_table_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch)
    print_table("", tuple(WORKER), [tuple(WORKER.values())])
    out = capsys.readouterr().out
    words = {*WORKER, *(word for cell in WORKER.values() for word in cell.split())}
    assert words <= {*out.split()}
    assert max(map(len, out.splitlines())) <= 80


def test_a_row_keeps_its_name_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch)
    columns = ("post", "stage", "type", "reason", "attempts", "since")
    row = (POST, "fetch", "NothingUsable", "no modality: image: HTTP 404", 1, "2026-11-29T02:33Z")
    print_table("", columns, [row])
    assert POST in capsys.readouterr().out.split()
