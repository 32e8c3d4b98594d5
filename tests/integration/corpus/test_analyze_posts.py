"""The command ``analyze_posts``: its files, what it says of bad input, kills, memory."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from corpus.analyze import measure
from corpus.analyze.measure import DIED, Measured, Task, measure_all
from scripts.data_scripts.analyze_posts import main
from tests.support import forked
from tests.support.corpus.analyze_corpus import Corpus, make_corpus
from tests.support.media import noise, quadrants, tone, write_jpeg, write_png, write_wav
from tests.support.services import wait_until
from tests.support.web.reports import assert_readable

pytestmark = pytest.mark.usefixtures("quick_processes")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts/data_scripts/analyze_posts.py"
RESULTS = ("analysis.json", "duplicates.jsonl", "report.html")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def done(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an undisturbed run over the corpus."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert main(arguments(corpus, out)) == 0
    return out


def arguments(corpus: Corpus, out: Path, *more: str) -> list[str]:
    folder = str(corpus.file.parent)
    return [str(corpus.file), "--out", str(out), "--media", folder, "--processes", "1", *more]


def analysis(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    return content


def results(out: Path) -> dict[str, bytes]:
    """The files; the page's commands name their folder."""
    return {name: (out / name).read_bytes().replace(bytes(out), b"OUT") for name in RESULTS}


def known(out: Path) -> int:
    """Files that the state has."""
    try:
        with sqlite3.connect(f"file:{out}/.state/media.sqlite?mode=ro", uri=True) as base:
            return int(base.execute("SELECT COUNT(*) FROM files").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_figures_are_those_of_the_files(corpus: Corpus, done: Path) -> None:
    """Counts, bytes, durations and sizes, held against the posts and the files themselves."""
    facts = analysis(done)
    assert facts["posts"]["kept"] == len(corpus.posts)
    labels: dict[str, int] = {}
    for post in corpus.posts:
        for name in post["labels"]:
            labels[name] = labels.get(name, 0) + 1
    assert facts["labels"]["counts"] == labels
    for kind, key in (("image", "images"), ("video", "videos"), ("audio", "audios")):
        sources = [source for post in corpus.posts for source in post[key]]
        contents = {(corpus.file.parent / source).read_bytes() for source in sources}
        of_kind = facts["media"][kind]
        assert of_kind["uses"] == len(sources)
        assert (of_kind["files"], of_kind["bytes"]) == (len(contents), sum(map(len, contents)))
        assert of_kind["broken"] == {}
        if kind != "image":
            assert of_kind["duration_s"]["values"] == len(contents)
            assert 0.5 < of_kind["duration_s"]["mean"] < 10
    assert set(facts["media"]["video"]["codecs"]) <= {"h264", "aac (sound)"}
    assert facts["modalities"]["text"] == sum(bool(post["text"].strip()) for post in corpus.posts)


def test_duplicates_have_the_agreed_form(corpus: Corpus, done: Path) -> None:
    """A group a line, with kind and members; the planted copy with other tags is in dispute."""
    lines = [json.loads(line) for line in (done / "duplicates.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"exact_media", "near_image", "near_text"}
    (exact,) = [line for line in lines if line["kind"] == "exact_media"]
    assert tuple(exact["members"]) == corpus.exact[0]
    duplicates = analysis(done)["duplicates"]
    assert duplicates["kinds"]["exact_media"]["labels_differ"] == 1
    assert "other" in duplicates["disputed_tags"]


class _Outside(HTMLParser):
    """Collects the addresses that a page would load, and elements that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{tag} {name}"
            for name, value in attrs
            if name in {"src", "href", "srcset"} and not str(value).startswith("data:image/jpeg")
        ]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_whole_and_loads_nothing(done: Path) -> None:
    """No source, no link, no address; every element is closed."""
    page = (done / "report.html").read_text(encoding="utf-8")
    parser = _Outside()
    parser.feed(page)
    assert parser.loads == []
    assert parser.open == []
    assert not re.search(r"https?://|url\(|@import|<script", page)


def test_page_shows_what_duplicates_share_and_posts_of_tags(corpus: Corpus, done: Path) -> None:
    """The same file once, by its name; pictures that look alike side by side; texts as texts."""
    page = (done / "report.html").read_text(encoding="utf-8")
    shared = next(p["images"][0] for p in corpus.posts if p["post_id"] == corpus.exact[0][0])
    groups = [part.partition("</section>")[0] for part in page.split('<div class="group">')[1:]]

    def begins(title: str) -> str:
        return next(group for group in groups if group.startswith(f"\n<h3>{title}"))

    same = begins("the same picture: 2 posts")
    assert same.count("<img") == 1
    assert Path(shared).name in same
    assert "same.jpg" in same
    assert "In dispute: " in same
    assert begins("pictures that look alike: 2 posts").count("<img") == 2
    assert "found a small bakery" in begins("nearly the same text: ")
    for tag, post_ids in analysis(done)["samples"].items():
        assert re.search(rf"<h3>{tag}: \d+ posts?</h3>", page)
        assert all(tag in post["labels"] for post in corpus.posts if post["post_id"] in post_ids)


def test_report_can_be_read_by_everybody_everywhere(done: Path, tmp_path: Path) -> None:
    assert_readable(done / "report.html", tmp_path / "profile")


def test_the_page_says_what_to_do_next(corpus: Corpus, done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>", "", page[page.index("What to do next") : page.index("</ol>")])
    assert "Decide on the tags of" in words
    assert f"python scripts/build_trainval_data.py --input {corpus.file}" in words
    assert f"--duplicates {done / 'duplicates.jsonl'}" in words


def test_a_sound_that_posts_share_is_named_with_a_note(tmp_path: Path) -> None:
    """There is nothing to see of it: its format, size and length tell what it is."""
    write_wav(tmp_path / "bird.wav", tone(440, 1.5))
    shutil.copy(tmp_path / "bird.wav", tmp_path / f"{'0f' * 32}.wav")
    posts = [
        {"post_id": "a", "audios": ["bird.wav"], "labels": ["x"]},
        {"post_id": "b", "audios": [f"{'0f' * 32}.wav"], "labels": ["x"]},
    ]
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    file.write_text("\n".join(map(json.dumps, posts)))
    assert main([str(file), "--out", str(out), "--media", str(tmp_path), "--processes", "1"]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    group = page[page.index("the same sound: 2 posts") :]
    assert re.search(r"pcm_s16le, 48 kB, 1.5 s", group)
    assert "<span>bird.wav</span>" in group
    assert "<span>audio 1</span>" in group


def test_names_from_the_posts_are_text_in_the_report(tmp_path: Path) -> None:
    """A tag, an author or an ID that is HTML is shown, not run."""
    evil = "<img src=x onerror=alert(1)>'\""
    posts = tmp_path / "p.jsonl"
    line = {"post_id": evil, "labels": [evil, "b"], "author": evil, "text": "x" * 30 + evil}
    twin = line | {"post_id": f"2{evil}", "labels": ["b"]}
    posts.write_text(f"{json.dumps(line)}\n{json.dumps(twin)}\n{json.dumps(line)}\n")
    assert main([str(posts), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert page.count("&lt;img") > 5
    parser = _Outside()
    parser.feed(page)
    assert parser.loads == []


def wait_for_children(group: int) -> None:
    """Wait until no process of a group is left."""

    def ended() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(ended, 60, "the end of its children")


def in_a_group(words: list[str]) -> None:
    os.setsid()
    main(words)


def test_killed_and_run_again_gives_the_same_bytes(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, count = tmp_path / "corpus", 600  # so many that none of the kills comes too late
    shutil.copytree(corpus.file.parent, folder)
    larger = Corpus(folder / corpus.file.name, [*corpus.posts])
    for i in range(count):
        write_png(folder / f"{i}.png", noise(64, 48, seed=i))
        larger.posts.append({"post_id": f"n{i}", "images": [f"{i}.png"]})
    larger.write()
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(larger, whole)) == 0
    for least in (1, 40):
        process = forked.start(in_a_group, arguments(larger, out))
        end = time.monotonic() + 60
        while known(out) < least and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.pid
        wait_for_children(process.pid)
        assert least <= known(out) < known(whole)
        assert not any((out / name).exists() for name in RESULTS)
    missing = known(whole) - known(out)
    capsys.readouterr()
    assert main(arguments(larger, out)) == 0
    assert f"{missing:,} files measured in this run" in capsys.readouterr().err
    assert results(out) == results(whole)
    assert not list((out / ".state").glob("work-*"))


def test_run_again_measures_only_what_changed(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.file.parent, folder)
    copy = Corpus(folder / corpus.file.name)
    assert main(arguments(copy, tmp_path / "out")) == 0
    next(folder.glob("media/near-*.jpg")).write_bytes(b"\xff\xd8\xff broken")
    capsys.readouterr()
    assert main(arguments(copy, tmp_path / "out")) == 0
    assert "1 files measured in this run" in capsys.readouterr().err
    assert sum(analysis(tmp_path / "out")["media"]["image"]["broken"].values()) == 1


def test_manifest_of_a_download_is_used(corpus: Corpus, tmp_path: Path) -> None:
    """URLs are looked up in the manifest; failed ones count with their reason."""
    shutil.copy(next((corpus.file.parent / "media").glob("*.mp4")), tmp_path / "v.mp4")
    ok = {"post_id": "a", "kind": "video", "source": "http://h/v", "status": "ok",
          "sha256": "cd" * 32, "path": "v.mp4", "bytes": 1, "reason": None}  # fmt: skip
    reason = {"stage": "fetch", "type": "FetchRefused", "message": "HTTP 404"}
    bad = ok | {"kind": "image", "source": "http://h/i", "status": "failed", "sha256": None,
                "path": None, "reason": reason}  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(ok)}\n{json.dumps(bad)}\n")
    post = {"post_id": "a", "videos": ["http://h/v"], "images": ["http://h/i", "http://h/other"]}
    twin = {"post_id": "b", "videos": ["v.mp4"]}
    posts = tmp_path / "p.jsonl"
    posts.write_text(f"{json.dumps(post)}\n{json.dumps(twin)}\n")
    out = tmp_path / "out"
    assert main([str(posts), "--out", str(out), "--media", str(tmp_path), "--processes", "1"]) == 0
    media = analysis(out)["media"]
    assert media["image"]["broken"] == {"FetchRefused: HTTP N": 1, "not downloaded": 1}
    assert media["video"]["files"] == 1
    group = json.loads((out / "duplicates.jsonl").read_text())
    assert group == {"kind": "exact_media", "members": ["a", "b"], "media": ["cd" * 32]}


def test_broken_lines_are_counted_with_their_reasons(tmp_path: Path) -> None:
    lines = [
        '{"post_id": "a", "labels": ["x"]}', "{", "[]", "{}", '{"post_id": 1}',
        '{"post_id": "b", "labels": "x"}', '{"post_id": "a"}', "", '{"post_id": "c"}',
    ]  # fmt: skip
    posts = tmp_path / "p.jsonl"
    posts.write_text("\n".join(lines) + "\n")
    assert main([str(posts), "--out", str(tmp_path / "out")]) == 0
    counts = analysis(tmp_path / "out")["posts"]
    assert counts["kept"] == 2
    assert counts["left_out"] == {
        "labels must be a list of texts": 1,
        "must have a post_id, a text": 3,
        "not JSON": 1,
        "post_id appears twice": 1,
    }
    assert counts["left_out_examples"][-1]["line"] == 7
    assert counts["without_labels"] == 1


def test_memory_does_not_grow_with_the_posts(tmp_path: Path) -> None:
    """Of 4 and of 80 MB of texts the peaks differ by the databases' caches, under 40 MB."""
    peaks = []
    for count in (100, 2000):
        posts = tmp_path / f"{count}.jsonl"
        with posts.open("w", encoding="utf-8") as file:
            for i in range(count):
                text = " ".join(str(i * 7919 % k) for k in range(100, 160))
                post = {"post_id": f"{i}", "labels": [f"t{i % 30}"], "text": text + "é" * 20_000}
                file.write(json.dumps(post, ensure_ascii=False) + "\n")
        code = (
            "import resource, sys; from scripts.data_scripts.analyze_posts import main; "
            "main(sys.argv[1:]); "
            "sys.stderr.write(f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')"
        )
        command = [sys.executable, "-c", code, str(posts), "--out", str(tmp_path / str(count))]
        ran = subprocess.run(command, capture_output=True, text=True, check=True,
                             cwd=SCRIPT.parents[2])  # fmt: skip
        peaks.append(int(ran.stderr.splitlines()[-1].split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40


_REAL = measure.measure


def _die(task: Task, reason: str | None = None) -> Measured:
    if task.name == "deadly" and reason is None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return _REAL(task, reason)


def test_a_killer_file_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jpeg(tmp_path / "a.jpg", quadrants(64, 48))
    names = ["a", "b", "deadly", "c", "d", "e", "f", "g", "h"]
    monkeypatch.setattr(measure, "measure", _die)
    outcomes = list(measure_all([Task(name, path, "image") for name in names], 1))
    by_name = {m.task.name: m.fact.reason for m in outcomes if isinstance(m, Measured)}
    assert by_name == {name: DIED if name == "deadly" else None for name in names}
