"""The tutorial, as a reader works through it: its commands in their order, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.cli import run
from tests.support.docs.shell import FENCE, ROOT

# Done already where tests run: the environment, and a folder of one's own.
PREPARED = re.compile(r"make env|source |mkdir ~/tour|cd ~/tour")
_TITLE = re.compile(r'^```python title="([\w.]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[tuple[str, str]]:
    """Return what a reader does: ``("draw.py", text)`` to save a file, ``("", line)`` to type."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    actions = []
    for block in FENCE.finditer(text):
        if named := _TITLE.match(block[0]):
            actions.append((named[1], named[2]))
        else:
            lines = block["text"].splitlines()
            actions += [("", line) for line in lines if not PREPARED.match(line)]
    return actions


@pytest.mark.slow
@pytest.mark.usefixtures("models_in_this_process")
def test_the_commands_of_the_tutorial_tag_new_pictures_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model says of the new pictures what `draw.py` says of them.

    `insighttag` runs in this process: four of its own would load all models again and again.
    """
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tour"
    folder.mkdir()
    monkeypatch.chdir(folder)
    said: dict[str, str] = {}
    for file, text in steps("tutorial.md"):
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif text.startswith("insighttag "):
            code = run(shlex.split(text)[1:])
            heard = capsys.readouterr()
            assert code == 0, f"{text}\n{heard.out}{heard.err}"
            said[text] = heard.out
        else:
            said[text] = subprocess.check_output(["bash", "-c", text], text=True)
    drawn = {
        words[0].removeprefix("new/"): set(words[1:])
        for words in map(str.split, said["python draw.py"].splitlines())
    }
    results = [json.loads(line) for line in (folder / "tags.jsonl").read_text("utf-8").splitlines()]
    assert {it["post_id"]: {tag["name"] for tag in it["tags"]} for it in results} == drawn
    assert (folder / "mine/train/latest/report/report.html").is_file()
    assert any((folder / "seen").iterdir())
    shown = said["insighttag tag new/0.png --bundle mine/bundle"]
    assert all(name in shown for name in drawn["0.png"])


def test_both_languages_have_the_same_commands() -> None:
    typed = [
        [line for file, line in steps(page) if not file]
        for page in ("tutorial.md", "tutorial.zh-CN.md")
    ]
    assert typed[0] == typed[1]
