"""A killed inference goes on: the same file, nothing twice, metrics of all."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.post import Features
from fusion.data.dataset import FeatureFiles
from fusion.infer.journal import Journal
from tests.support.scripts import infer_rig as rig

SLOW = """
import sys, time
import infer_net
from fusion.data.dataset import FeatureFiles
log, read = open(sys.argv.pop(1), "a", buffering=1), FeatureFiles.features
def slow(self, post_id, path, fingerprints):
    time.sleep(0.01)
    log.write(post_id + chr(10))
    return read(self, post_id, path, fingerprints)
FeatureFiles.features = slow
sys.exit(infer_net.main(sys.argv[1:]))
"""


def slow_command(folder: Path, *more: str) -> list[str]:
    """`infer_net.py` that notes what it reads, a hundredth of a second each."""
    python, _, *rest = rig.command(folder, *more)
    return [python, "-c", SLOW, str(folder / "read.log"), *rest]


def run_until_killed(folder: Path, *more: str, after: int) -> None:
    """Kill -9 when so many entries are noted as done."""
    process = rig.start(slow_command(folder, *more))
    note = folder / "t.jsonl.part.json"
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if note.exists() and json.loads(note.read_text())["done"] >= after:
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "t.jsonl").exists()


@pytest.mark.slow
def test_kill_9_twice_and_go_on(tmp_path: Path) -> None:
    """Byte-equal to an undisturbed run, with its metrics; only a batch in flight is read again."""
    folder = rig.make(tmp_path, posts=300)
    entries = json.loads((folder / "posts.json").read_text())
    entries[100]["features"] = "gone.safetensors"
    for entry in entries[::3]:
        del entry["labels"]
    (folder / "posts.json").write_text(json.dumps(entries))
    given = ["--skip_bad", "--output"]
    process = rig.start(rig.command(folder, *given, str(folder / "whole.jsonl")))
    wanted, err = process.communicate(timeout=150)
    assert process.returncode == 0, err

    output = [*given, str(folder / "t.jsonl")]
    run_until_killed(folder, *output, after=60)
    run_until_killed(folder, *output, after=180)
    process = rig.start(slow_command(folder, *output, "--resume"))
    found, err = process.communicate(timeout=150)
    assert process.returncode == 0, err

    def metrics(text: str) -> str:
        return re.sub(r"  \(went on.*|\n.*posts/s.*", "", text).splitlines()[0]

    assert (folder / "t.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert metrics(found) == metrics(wanted)
    assert "skipped 1 " in found
    assert re.search(r"went on after (18\d|19\d|2\d\d)", found)
    listed = [folder / f"{name}.jsonl.skipped.jsonl" for name in ("t", "whole")]
    assert listed[0].read_bytes() == listed[1].read_bytes()
    read = (folder / "read.log").read_text().split()
    # A batch of 7 was in flight at each kill: read, and not yet written.
    assert len(read) - len(set(read)) <= 14
    assert not list(folder.glob("*.part*"))


def stop_after(monkeypatch: pytest.MonkeyPatch, posts: int) -> None:
    """Let reading fail as Ctrl-C does after so many posts."""
    left = [posts]
    read = FeatureFiles.features

    def features(self: FeatureFiles, *given: Any) -> Features:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(self, *given)

    monkeypatch.setattr(FeatureFiles, "features", features)


def test_what_was_left_must_be_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another input, bundle or setting is refused by name, until ``--restart``."""
    folder = rig.make(tmp_path)
    output = ["--output", str(folder / "t.jsonl")]
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        assert rig.infer(folder, *output) == 1
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert rig.infer(folder, *output, "--set", "batch_size=8") == 2
    said = capsys.readouterr().err
    assert "was begun with another batch_size (7, now 8)" in said
    assert "--restart" in said
    rig.write_bundle(folder / "bundle", seed=9)
    assert rig.infer(folder, *output, "--resume") == 2
    assert "another bundle" in capsys.readouterr().err
    assert rig.infer(folder, *output, "--restart") == 0
    assert "went on" not in capsys.readouterr().out
    assert len(rig.lines(folder / "t.jsonl")) == 40


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.pop("sizes"),
        lambda note: note["sizes"].pop("skipped"),
        lambda note: note.update(signature=7),
        lambda note: note.update(posts=None),
    ],
    ids=["no sizes", "a size less", "another signature", "no posts"],
)
def test_a_note_of_another_release_is_refused(change: Any, tmp_path: Path) -> None:
    """One line that names the note and the way out, which works."""
    base = tmp_path / "t.jsonl"
    with Journal(base, {"batch_size": 7}) as journal:
        journal.write("part", b"line")
        journal.commit(1, 1)
    note = tmp_path / "t.jsonl.part.json"
    content = json.loads(note.read_text())
    change(content)
    note.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"part\.json: .* another release .* --restart"):
        Journal(base, {"batch_size": 7}).__enter__()
    with Journal(base, {"batch_size": 7}, restart=True) as journal:
        assert journal.done == 0


def test_what_was_written_beyond_the_last_note_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between writing a batch and its note leaves half of something."""
    folder = rig.make(tmp_path)
    assert rig.infer(folder, "--output", str(folder / "whole.jsonl")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 30)
        assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 1
    for kind in ("", ".scores", ".skipped"):
        with (folder / f"t.jsonl.part{kind}").open("ab") as file:
            file.write(b'{"post_id": "half')
    assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 0
    assert (folder / "t.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_two_runs_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is told; the first is not disturbed."""
    folder = rig.make(tmp_path, posts=8)
    with Journal(folder / "t.jsonl", {}):
        assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 2
    assert "another run is writing it" in capsys.readouterr().err
    assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 0


def test_a_process_that_dies_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1 and the way on; no hang."""
    folder = rig.make(tmp_path, posts=30)
    script = (
        "import sys, os, infer_net\n"
        "from fusion.data.dataset import FeatureFiles\n"
        "def dies(self, post_id, path, fingerprints): os._exit(7)\n"
        "FeatureFiles.features = dies\n"
        "if __name__ == '__main__': sys.exit(infer_net.main(sys.argv[1:]))\n"
    )
    (folder / "dying.py").write_text(script)
    python, _, *rest = rig.command(folder, "--output", str(folder / "t.jsonl"))
    process = rig.start([python, str(folder / "dying.py"), *rest, "--processes", "2"])
    _, err = process.communicate(timeout=150)
    assert process.returncode == 1
    assert re.fullmatch(
        r"infer_net.py: process 0 on cpu died \(exit code 7\); the same command goes on\n", err
    )
