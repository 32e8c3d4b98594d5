"""Files of posts: what is read, what is refused and why, and that files appear whole."""

import json
import signal
import threading
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.post import Media, Post
from corpus.records import AtomicLines, DataFile, Form, Summary, bad_line, post_line
from corpus.runs import Interrupt, Stopper, only_one
from fusion.data import data_file
from fusion.data.data_file import (
    BadLine,
    CorpusPost,
    check_holds_post,
    count_lines,
    local_path,
    read_posts,
)

FULL = {
    "post_id": "a/猫",
    "labels": ["x", "y"],
    "text": "line\nbreak \u2028",
    "ocr": None,
    "images": ["http://h/1.png", "media/2.png"],
    "videos": ["v.mp4"],
    "audios": [],
    "author": "me",
    "created": "2026-01-01T00:00:00+00:00",
}


def test_line_is_read_and_written_alike(tmp_path: Path) -> None:
    line = json.dumps(FULL, ensure_ascii=False)
    file = tmp_path / "p.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    (entry,) = read_posts(file)
    media = (
        Media("image", "http://h/1.png"),
        Media("image", "media/2.png"),
        Media("video", "v.mp4"),
    )
    post = Post("a/猫", text="line\nbreak \u2028", media=media, labels=("x", "y"))
    assert entry == CorpusPost(post, author="me", created="2026-01-01T00:00:00+00:00", line=1)
    assert isinstance(entry, CorpusPost)
    assert post_line(entry) == line


@pytest.mark.parametrize(
    ("line", "reason", "post_id"),
    [
        (b"{", "not JSON: ", None),
        (b"[" * 100_000, "not JSON: nested too deeply", None),
        (b"[1]", "must have a post_id, a text: got [1]", None),
        (b"{}", "must have a post_id, a text", None),
        (b'{"post_id": 3}', "must have a post_id, a text: got 3", None),
        (b'{"post_id": ""}', "must have a post_id, a text", None),
        (b'{"post_id": "\\ud800"}', "post_id has characters that UTF-8", None),
        (b'{"post_id": "a", "text": 3}', "text must be a text", "a"),
        (b'{"post_id": "a", "labels": "x"}', "labels must be a list of texts", "a"),
        (b'{"post_id": "a", "images": [1]}', "images must be a list of texts", "a"),
        (b'{"post_id": "a", "created": 5}', "created must be a text", "a"),
        (b'{"post_id": "\xff"}', "not UTF-8", None),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, reason: str, post_id: str | None) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b'{"post_id": "first"}\n\n' + line + b'\n{"post_id": "last"}'
    )
    first, bad, last = read_posts(file)
    assert isinstance(first, CorpusPost)
    assert isinstance(last, CorpusPost)
    assert (first.post.post_id, last.post.post_id, last.line) == ("first", "last", 4)
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.post_id) == (3, post_id)
    assert bad.reason.startswith(reason)
    assert json.loads(bad_line(bad)) == {"line": 3, "post_id": post_id, "reason": bad.reason}


def test_endless_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "MAX_ENTRY_BYTES", 100)
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"post_id": "' + b"x" * 5_000_000 + b'"}\n{"post_id": "b"}\n')
    bad, good = read_posts(file)
    assert bad == BadLine(1, "longer than 100 bytes")
    assert good == CorpusPost(Post("b"), line=2)


def test_data_file_is_read_by_the_same_reader(tmp_path: Path) -> None:
    """A list with feature files; half characters of JSON's escapes are replaced."""
    file = tmp_path / "p.json"
    text = '[{"post_id": "a", "features": "f/a", "text": "\\ud800", "more": 1}, 5]'
    file.write_text(text, encoding="utf-8-sig")
    good, bad = read_posts(file)
    assert good == CorpusPost(Post("a", text="?"), features="f/a", line=1)
    assert bad == BadLine(2, "must have a post_id, a text: got 5")
    assert isinstance(good, CorpusPost)
    assert json.loads(post_line(good))["features"] == "f/a"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such data file"),
        ("none.json", None, "no such data file"),
        ("b.json", '{"post_id": "a"}\n{"post_id": "b"}', "must be a list of posts; name a file of"),
        ("c.json", '[{"post_id": "a"} {', "not a JSON data file"),
    ],
)
def test_unreadable_file_is_told(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        list(read_posts(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "limit", "said"),
    [
        ("p.jsonl", "", None, "it is empty"),
        ("p.jsonl", "\n \n", None, "it is empty"),
        ("p.json", "[]", None, "it is empty"),
        ("p.jsonl", "\n{\n", None, "the line is broken; line 2: not JSON"),
        ("p.jsonl", "[]\n{}\n", None, "all 2 lines are broken; line 1: must have a post_id"),
        ("p.json", "[{}, 1]", None, "all 2 lines are broken; line 1: must have a post_id"),
        ("p.jsonl", '1\n2\n{"post_id": "a"}\n', 2, "the first 2 lines are broken; line 1: must"),
    ],
)
def test_file_without_a_readable_post_is_told(
    tmp_path: Path, name: str, content: str, limit: int | None, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        check_holds_post(path, limit)
    assert str(caught.value).startswith(f"{path}: holds no readable post: {said}")


def test_one_readable_post_is_enough(tmp_path: Path) -> None:
    """Any number of broken lines may come before it; all of them are counted."""
    path = tmp_path / "p.jsonl"
    path.write_text('{\n\n1\n{"post_id": "a"}', encoding="utf-8")
    check_holds_post(path)
    check_holds_post(path, 3)
    assert count_lines(path) == 4


def test_local_sources_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs are no paths; a path is relative to the file, else to the working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for place in ("here/both", "there/both", "here/cwd", "there/file"):
        (tmp_path / place).write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "there" / "p.jsonl"
    assert local_path("both", file) == tmp_path / "there/both"
    assert local_path("file", file) == tmp_path / "there/file"
    assert local_path("cwd", file) == Path("cwd")
    assert local_path("none", file) == tmp_path / "there/none"
    assert local_path("x" * 5000, file) is not None
    assert local_path("HTTPS://h/x", file) is None


def test_lines_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    with AtomicLines(path) as lines:
        lines.write("猫")
        assert not path.exists()
    assert path.read_bytes() == "猫\n".encode()

    def fail() -> None:
        with AtomicLines(path) as lines:
            lines.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == "猫\n".encode()
    assert list(path.parent.iterdir()) == [path]
    (path.parent / ".x.jsonl.part").write_text("left by a kill")
    with AtomicLines(path) as lines:
        lines.write("b")
    assert path.read_text() == "b\n"


def test_summary_counts_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons are counted and sorted; brackets are shown; endless reasons do not fill memory."""
    summary = Summary("Posts")
    summary.done(3)
    summary.failed("[x] broken")
    summary.skipped("later", 1500)
    summary.figures["bytes"] = 12345
    summary.write(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content == {
        "total": 1504,
        "done": 3,
        "skipped": {"later": 1500},
        "failed": {"[x] broken": 1},
        "bytes": 12345,
    }
    assert Summary.of("Posts", content).as_dict() == content
    summary.show()
    shown = capsys.readouterr().out
    assert "[x] broken" in shown
    assert "1,500" in shown
    assert "12,345" in shown
    monkeypatch.setattr("corpus.records._MAX_REASONS", 2)
    for i in range(5):
        summary.failed(f"reason {i}")
    assert summary.failures == 6
    assert summary.as_dict()["failed"] == {"[x] broken": 1, "reason 0": 1, "other reasons": 4}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "d" / "lock", "the folder"):
        with (
            pytest.raises(ConfigError, match="the folder is being written by another run"),
            only_one(tmp_path / "d" / "lock", "the folder"),
        ):
            pass
    with only_one(tmp_path / "d" / "lock", "the folder"):
        pass


def test_signal_is_remembered_and_handlers_come_back() -> None:
    """SIGTERM does not end the process; afterwards all is as it was."""
    before = signal.getsignal(signal.SIGTERM)
    with Stopper() as stopper:
        asked = [stopper.asked]
        signal.raise_signal(signal.SIGTERM)
        asked.append(stopper.asked)
        assert asked == ["", "SIGTERM"]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a second one ends it"
    assert signal.getsignal(signal.SIGTERM) == before
    assert threading.current_thread() is threading.main_thread()


def test_second_signal_ends_what_has_processes_of_its_own() -> None:
    """It is an exception, so that they are ended; so is the first while models load."""
    before = signal.getsignal(signal.SIGHUP)
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        asked = [interrupt.asked]
        interrupt.patient = True
        signal.raise_signal(signal.SIGHUP)
        asked.append(interrupt.asked)
        assert asked == ["", "SIGHUP"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_data_file_is_a_list_or_lines(tmp_path: Path, form: Form, number: int) -> None:
    entries = [{"post_id": f"猫{i}"} for i in range(number)]
    path = tmp_path / f"f.{form}"
    with AtomicLines(path) as lines:
        file = DataFile(lines, form)
        for entry in entries:
            file.add(entry)
        file.end()
    text = path.read_text(encoding="utf-8")
    if form == "json":
        assert json.loads(text) == entries
        assert text.count("\n") == number + 2
    else:
        assert [json.loads(line) for line in text.splitlines()] == entries
    assert number == 0 or "猫" in text
