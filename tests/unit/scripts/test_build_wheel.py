"""The rewriting of imports for the wheel, in which all of ours is inside ``insighttag``."""

import re
from pathlib import Path

import pytest

from scripts.build_wheel import move_all, rewritten
from tests.unit.test_house_style import PACKAGES, modules, name

NAMES = ["common", "config", "online_process"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from config.load import x\n", "from insighttag.config.load import x\n"),
        ("from common import errors\n", "from insighttag.common import errors\n"),
        ("def f():\n    from config import y\n", "def f():\n    from insighttag.config import y\n"),
        ("text = '更'; from config import y\n", "text = '更'; from insighttag.config import y\n"),
        ("from configparser import x\n", None),
        ("from commonly.config import x\n", None),
        ("from .config import x\n", None),
        ("import os, json\n", None),
        ("import config\n", "from insighttag import config\n"),
        ("import online_process as o\n", "from insighttag import online_process as o\n"),
        ('ROLES = {"a": "common.files:read"}\n', 'ROLES = {"a": "insighttag.common.files:read"}\n'),
        ('log("common.file_read")\n', None),
        ('x = [python, "-m", "config", "1"]\n', 'x = [python, "-m", "insighttag.config", "1"]\n'),
        ('run("-m", "config.load")\n', 'run("-m", "insighttag.config.load")\n'),
        ('run("-m", "pytest")\n', None),
        ("import sys\nsys.path.insert(0, str(HERE))  # why\n", "import sys\npass\n"),
    ],
)
def test_what_names_one_of_ours_is_changed_and_nothing_else(before: str, after: str | None) -> None:
    assert rewritten(before, NAMES, "m.py") == (before if after is None else after)


@pytest.mark.parametrize("text", ["import config.load\n", "import os, common\n"])
def test_an_import_that_cannot_be_written_otherwise_ends_the_build(text: str) -> None:
    with pytest.raises(SyntaxError, match=r"m.py:1: write `from ... import ...`"):
        rewritten(text, NAMES, "m.py")


def test_packages_and_modules_move_with_their_files(tmp_path: Path) -> None:
    """A second build over the first one leaves nothing of it."""
    for stale in (True, False):
        for part in ("insighttag", "config", "common"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / "__init__.py").write_text("from common import x\n")
        (tmp_path / "config" / ("old.yaml" if stale else "new.yaml")).touch()
        (tmp_path / "online_process.py").write_text("from config import y\n")
        move_all(tmp_path, ["insighttag", *NAMES])
    assert [path.name for path in tmp_path.iterdir()] == ["insighttag"]
    inside = tmp_path / "insighttag"
    files = {str(path.relative_to(inside)) for path in inside.rglob("*") if path.is_file()}
    assert files == {
        *("__init__.py", "online_process.py", "common/__init__.py"),
        *("config/__init__.py", "config/new.yaml"),
    }
    assert (inside / "online_process.py").read_text() == "from insighttag.config import y\n"


def test_every_import_of_ours_can_be_rewritten() -> None:
    """`rewritten` would refuse others, and the wheel could not be built."""
    ours = "|".join(name for name in PACKAGES if name != "insighttag")
    refused = re.compile(rf"^\s*import (?:(?:{ours})\.|.*, (?:{ours})\b)", re.MULTILINE)
    texts = {name(path): path.read_text(encoding="utf-8") for path in modules()}
    assert [path for path, text in texts.items() if refused.search(text)] == []
