"""A second inference into the same output goes on: nothing twice, metrics of all posts."""

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import WorkerDied
from common.post import Features
from fusion.data.data_file import Record
from fusion.data.dataset import FeatureFiles
from fusion.infer.inference import run_chunks
from tests.support import forked
from tests.support.scripts import infer_rig as rig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rig.make(tmp_path)


def numbers(text: str) -> str:
    return text.splitlines()[0]


def assert_same_scores(one: Path, other: Path) -> None:
    """JSON lines hold the same posts, each once, with the same scores, in any order."""
    sides = [sorted(rig.lines(path), key=lambda line: line["post_id"]) for path in (one, other)]
    ids, scores = (
        [[line[key] for line in side] for side in sides] for key in ("post_id", "scores")
    )
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(ids[0])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def edit(folder: Path, change: Callable[[list[Any]], object]) -> None:
    entries = json.loads((folder / "posts.json").read_text())
    change(entries)
    (folder / "posts.json").write_text(json.dumps(entries))


def stop_after(monkeypatch: pytest.MonkeyPatch, posts: int) -> None:
    """Let reading fail as Ctrl-C does after some posts."""
    remaining = [posts]
    read = FeatureFiles.features

    def features(self: FeatureFiles, *arguments: Any) -> Features:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(FeatureFiles, "features", features)


def infer_part(folder: Path, output: Path, *more: str, posts: int = 20) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, posts)
        assert rig.infer(folder, "--output", str(output), *more) == 1


def test_a_killed_run_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The posts, scores, metrics and bad posts of an undisturbed run."""
    folder = rig.make(tmp_path, posts=150)

    def change(entries: list[Any]) -> None:
        entries[50]["features"] = "gone.safetensors"
        for entry in entries[::3]:
            del entry["labels"]

    edit(folder, change)
    assert rig.infer(folder, "--skip_bad", "--output", str(folder / "whole.jsonl")) == 0
    uninterrupted = numbers(capsys.readouterr().out)
    output, part = folder / "t.jsonl", folder / "t.jsonl.part"
    process = forked.start(rig.infer_slowly, folder, "--skip_bad", "--output", str(output))
    while not (part.exists() and part.read_bytes().count(b"\n") >= 60):
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not output.exists()
    assert rig.infer(folder, "--skip_bad", "--output", str(output), "--resume") == 0
    resumed = numbers(capsys.readouterr().out)
    assert re.sub(r"  \(went on.*", "", resumed) == uninterrupted
    assert "skipped 1 " in resumed
    assert re.search(r"went on after ([6-9]\d|1\d\d)", resumed)
    assert_same_scores(output, folder / "whole.jsonl")
    listed = [folder / f"{name}.jsonl.skipped.jsonl" for name in ("t", "whole")]
    assert listed[0].read_bytes() == listed[1].read_bytes()
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize(("name", "half"), [("t.jsonl", b'{"post_id": "ha'), ("t.csv", b"ha,x\n")])
def test_an_interrupted_run_goes_on(
    name: str, half: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same metrics and rows; of a half-written last row nothing stays."""
    whole = folder / f"whole-{name}"
    assert rig.infer(folder, "--output", str(whole)) == 0
    uninterrupted = numbers(capsys.readouterr().out)
    infer_part(folder, folder / name)
    assert "interrupted; the same command continues" in capsys.readouterr().err
    with (folder / f"{name}.part").open("ab") as file:
        file.write(half)
    assert rig.infer(folder, "--output", str(folder / name)) == 0
    said = numbers(capsys.readouterr().out)
    assert said.replace("  (went on after 14)", "") == uninterrupted
    assert "(went on after 14)" in said
    rows = (folder / name).read_bytes().split(b"\n")
    assert [row.split(b",")[0] for row in rows] == [
        row.split(b",")[0] for row in whole.read_bytes().split(b"\n")
    ]
    assert not list(folder.glob("*.part*"))


def another_run(folder: Path, change: str, rows: Path) -> list[str]:
    """Change what the rows of an earlier run were made of, or the rows; options of the next run."""
    match change:
        case "bundle":
            rig.write_bundle(folder / "bundle", seed=9)
        case "input":
            edit(folder, lambda entries: entries.pop(3))
        case "broken":
            rows.write_bytes(b"no JSON\r\n")
    return {"scores": ["--set", "scores=false"], "format": ["--format", "csv"]}.get(change, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("bundle", "was started with another bundle"),
        ("input", "was started with another input: it holds post 'posts3'"),
        ("scores", "was started with other scores (True)"),
        ("format", "was started with other columns"),
        ("broken", "Expecting value"),
    ],
)
def test_rows_that_this_run_would_not_write_are_refused(
    change: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the file and the way out, which works."""
    output = folder / "t.out"
    infer_part(folder, output)
    more = another_run(folder, change, folder / "t.out.part")
    if change == "format":
        with (folder / "t.out.part").open("ab") as file:
            file.write(b"\r\n")
    said = rig.mistake(capsys, folder, "--output", str(output), *more)
    assert says in said
    assert "t.out.part" in said
    assert "--restart" in said
    assert rig.infer(folder, "--output", str(output), *more, "--restart") == 0
    assert "went on" not in capsys.readouterr().out
    assert not list(folder.glob("*.part*"))


def test_posts_of_a_whole_output_are_not_computed_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same metrics, exit 0, and the file untouched; ``--restart`` computes it."""
    output = folder / "t.jsonl"
    options = ["--output", str(output)]
    assert rig.infer(folder, *options) == 0
    first, before = capsys.readouterr().out, output.stat()
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        for more in ([], ["--skip_bad"], ["--resume"]):
            assert rig.infer(folder, *options, *more) == 0
            again = capsys.readouterr().out.splitlines()
            assert again[0] == f"{numbers(first)}  (went on after 40)"
            assert again[1:] == [f"complete already: {output}; --restart computes it again"]
            after = output.stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert rig.infer(folder, *options, "--restart") == 1
    capsys.readouterr()
    infer_part(folder, output, "--restart")
    assert rig.infer(folder, *options) == 0
    assert "(went on after 14)" in capsys.readouterr().out
    assert output.stat().st_mtime_ns > before.st_mtime_ns


@pytest.mark.parametrize("change", ["input", "bundle", "format", "broken"])
def test_a_whole_output_of_something_else_is_made_anew(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rig.make(tmp_path, posts=8)
    output = folder / "t.jsonl"
    assert rig.infer(folder, "--output", str(output)) == 0
    more = another_run(folder, change, output)
    for complete in (False, True):
        capsys.readouterr()
        assert rig.infer(folder, "--output", str(output), *more) == 0
        assert ("complete already" in capsys.readouterr().out) == complete


def test_posts_that_came_later_are_added(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New entries of the input, and posts that were bad: only these are computed."""
    late = folder / json.loads((folder / "posts.json").read_text())[3]["features"]
    late.rename(folder / "late")
    whole = (folder / "posts.json").read_text()
    edit(folder, lambda entries: entries.__delitem__(slice(30, None)))
    output = folder / "t.jsonl"
    options = ["--output", str(output), "--skip_bad"]
    for resumed in ("", "  (went on after 29)"):
        assert rig.infer(folder, *options) == 0
        said = capsys.readouterr().out
        assert "posts 29  labelled 29  skipped 1" in said
        assert numbers(said).endswith(resumed)
        assert f"left out, and why: {output}.skipped.jsonl" in said
        assert "complete already" not in said
    (folder / "late").rename(late)
    (folder / "posts.json").write_text(whole)
    assert rig.infer(folder, *options) == 0
    said = capsys.readouterr().out
    assert "posts 40  labelled 40  gap" in said
    assert "(went on after 29)" in said
    assert "left out" not in said
    assert rig.infer(folder, "--output", str(folder / "whole.jsonl")) == 0
    assert_same_scores(output, folder / "whole.jsonl")
    assert not Path(f"{output}.skipped.jsonl").exists()


def test_entries_without_id_or_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every entry has its row, whether the run was interrupted or not."""
    entries = json.loads((folder / "posts.json").read_text())
    listed = [entry["features"] if i % 2 else entry["post_id"] for i, entry in enumerate(entries)]
    (folder / "ids.txt").write_text("\n".join([*listed, *listed[:3]]))
    output = folder / "t.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 25)
        assert rig.infer(folder, "--output", str(output), posts="ids.txt") == 1
    assert rig.infer(folder, "--output", str(output), posts="ids.txt") == 0
    post_ids = sorted(line["post_id"] for line in rig.lines(output))
    assert post_ids == sorted([*(e["post_id"] for e in entries), *(f"posts{i}" for i in range(3))])


def test_metrics_need_earlier_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``scores`` the output does not hold what metrics are computed of."""
    output, more = folder / "t.jsonl", ["--set", "scores=false"]
    infer_part(folder, output, *more)
    assert rig.infer(folder, "--output", str(output), *more) == 0
    said = capsys.readouterr().out
    assert "posts 40  labelled 26  gap" in said
    assert "without 14 labelled posts of an earlier run" in said


def test_two_runs_do_not_write_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "t.jsonl"
    with (folder / "t.jsonl.part").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = rig.mistake(capsys, folder, "--output", str(output), "--restart")
        assert "another run is writing it" in said
        assert (folder / "t.jsonl.part").exists()
    assert rig.infer(folder, "--output", str(output)) == 0


class Dying:
    """A tagger whose process dies of its first post."""

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, posts: Sequence[Any]) -> list[Any]:
        os._exit(7)

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("quick_processes")
def test_a_process_that_dies_ends_the_run() -> None:
    with pytest.raises(WorkerDied, match="a process that tags has died"):
        list(run_chunks(Dying, ["cpu", "cpu"], [[Record("a")]]))
