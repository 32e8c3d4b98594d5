"""A notebook's own modules, whose folder goes before a checkout's."""

from pathlib import Path

import pytest

from tests.support.processes import python


@pytest.fixture
def importing(tmp_path: Path) -> str:
    """The code of a notebook in a folder that goes before ours."""
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import insighttag"


def test_a_module_with_the_name_of_one_of_ours_is_named(tmp_path: Path, importing: str) -> None:
    (tmp_path / "config.py").touch()
    done = python("-c", importing)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"the name 'config' is taken by {tmp_path / 'config.py'}" in last
    assert "pip install" in last


def test_a_folder_without_code_does_no_harm(tmp_path: Path, importing: str) -> None:
    """Many projects have a folder config/ or scripts/."""
    for name in ("config", "scripts"):
        (tmp_path / name).mkdir()
    code = f"{importing}; import config.load, scripts.cli; print(config.__file__)"
    done = python("-c", code, check=True)
    assert Path(done.stdout.strip()).parent.parent == Path(__file__).resolve().parents[3]
