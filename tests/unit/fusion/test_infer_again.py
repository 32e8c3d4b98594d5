"""`infer_net.py` a second time: what is whole is not computed anew, bad posts can be left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusion.infer.infer_complete import note_of
from tests.support.scripts import infer_rig as rig
from tests.unit.fusion.test_infer_resume import stop_after


def numbers(text: str) -> str:
    """The line with counts and metrics."""
    return text.splitlines()[0]


def test_what_is_whole_is_not_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same line of metrics, exit 0, and the file untouched; ``--restart`` computes it."""
    folder = rig.make(tmp_path)
    output = folder / "t.jsonl"
    given = ["--output", str(output)]
    assert rig.infer(folder, *given) == 0
    first, before = capsys.readouterr().out, output.stat()
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        for more in ([], ["--skip_bad"], ["--resume"]):
            assert rig.infer(folder, *given, *more) == 0
            again = capsys.readouterr().out
            assert numbers(again) == numbers(first)
            said = f"complete already: {output}; --restart computes it anew"
            assert again.splitlines()[1:] == [said]
            assert output.stat() == before
        assert rig.infer(folder, *given, "--restart") == 1
    capsys.readouterr()
    assert rig.infer(folder, *given, "--restart") == 0
    assert "complete" not in capsys.readouterr().out
    assert output.stat().st_mtime_ns > before.st_mtime_ns
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize("change", ["input", "bundle", "output", "format", "features", "note"])
def test_what_is_made_of_something_else_is_computed(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another input, bundle, setting or feature folder; or the output was changed since."""
    folder = rig.make(tmp_path, posts=8)
    output, more = folder / "t.jsonl", []
    assert rig.infer(folder, "--output", str(output)) == 0
    if change == "input":
        posts = json.loads((folder / "posts.json").read_text())
        (folder / "posts.json").write_text(json.dumps(posts[:7]))
    elif change == "bundle":
        rig.write_bundle(folder / "bundle", seed=9)
    elif change == "output":
        output.write_text(output.read_text() + "\n")
    elif change == "format":
        more = ["--format", "csv"]
    elif change == "features":
        (folder / "features").rename(folder / "moved")
        (folder / "features").symlink_to(folder / "moved")
    else:
        note_of(output).write_text("{}")
    capsys.readouterr()
    assert rig.infer(folder, "--output", str(output), *more) == 0
    assert "complete already" not in capsys.readouterr().out
    assert rig.infer(folder, "--output", str(output), *more) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_run_that_stopped_at_a_bad_post_goes_on_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``--skip_bad`` the same as from the beginning: tags, metrics, counts and the list."""
    folder = rig.make(tmp_path, posts=40)
    entries = json.loads((folder / "posts.json").read_text())
    for bad in (23, 24, 37):
        entries[bad]["features"] = f"gone-{bad}.safetensors"
    (folder / "posts.json").write_text(json.dumps(entries))
    given = ["--output", str(folder / "t.jsonl")]
    assert rig.infer(folder, *given) == 2
    assert "--skip_bad leaves such posts out" in capsys.readouterr().err
    assert json.loads((folder / "t.jsonl.part.json").read_text())["done"] == 21
    assert rig.infer(folder, *given, "--skip_bad") == 0
    found = capsys.readouterr().out
    assert "  skipped 3  " in found
    assert "(went on after 21)" in found
    assert rig.infer(folder, "--output", str(folder / "whole.jsonl"), "--skip_bad") == 0
    whole = capsys.readouterr().out
    assert numbers(found).replace("  (went on after 21)", "") == numbers(whole)
    for name in ("{}.jsonl", "{}.jsonl.skipped.jsonl"):
        one, other = (folder / name.format(stem) for stem in ("t", "whole"))
        assert one.read_bytes() == other.read_bytes()

    # Without the option no post may be missing, so that there is something to do.
    assert rig.infer(folder, *given) == 2


def test_what_left_out_posts_is_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their features may have come since; when none was left out there is nothing to do."""
    folder = rig.make(tmp_path, posts=8)
    entries = json.loads((folder / "posts.json").read_text())
    late = folder / entries[3]["features"]
    late.rename(folder / "late")
    given = ["--output", str(folder / "t.jsonl"), "--skip_bad"]
    for _ in range(2):
        assert rig.infer(folder, *given) == 0
        said = capsys.readouterr().out
        assert "complete already" not in said
        assert "posts 7 " in said
        assert f"left out, and why: {folder / 't.jsonl.skipped.jsonl'}" in said
    (folder / "late").rename(late)
    assert rig.infer(folder, *given) == 0
    said = capsys.readouterr().out
    assert "posts 8 " in said
    assert "left out" not in said
    assert len(rig.lines(folder / "t.jsonl")) == 8
    assert rig.infer(folder, *given) == 0
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"posts": 8},
        {"posts": 8, "labelled": 8, "metrics": {}, "skipped": 0, "speed": 1.0},
        {"posts": 8, "labelled": 8, "metrics": "good", "skipped": 0},
        {"posts": "8", "labelled": 8, "metrics": {}, "skipped": None},
        [8, 8],
    ],
)
def test_a_note_of_another_release_is_no_note(
    facts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer, more or other facts: the output is computed, and its note is one again."""
    folder = rig.make(tmp_path, posts=8)
    output = folder / "t.jsonl"
    assert rig.infer(folder, "--output", str(output)) == 0
    note = json.loads(note_of(output).read_text())
    note_of(output).write_text(json.dumps({**note, "facts": facts}))
    capsys.readouterr()
    assert rig.infer(folder, "--output", str(output)) == 0
    assert "complete already" not in capsys.readouterr().out
    assert json.loads(note_of(output).read_text())["facts"] == note["facts"]


def test_a_run_that_leaves_out_does_not_go_on_as_one_that_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have left out posts already, which a run without the option never does."""
    folder = rig.make(tmp_path)
    given = ["--output", str(folder / "t.jsonl")]
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        assert rig.infer(folder, *given, "--skip_bad") == 1
    assert rig.infer(folder, *given) == 2
    assert "was begun with another skip_bad (True, now False)" in capsys.readouterr().err


def test_an_interrupted_restart_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output is still whole, and what was asked for last is finished all the same."""
    folder = rig.make(tmp_path)
    given = ["--output", str(folder / "t.jsonl")]
    assert rig.infer(folder, *given) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        assert rig.infer(folder, *given, "--restart") == 1
    capsys.readouterr()
    assert rig.infer(folder, *given) == 0
    assert "(went on after 14)" in capsys.readouterr().out
