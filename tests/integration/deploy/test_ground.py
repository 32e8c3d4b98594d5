"""The ground that people stand on: make targets, the CI script, the hooks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
    return subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@needs_make
@pytest.mark.parametrize(
    ("target", "does"),
    [
        ("demo", "-m demo"),
        ("test", "-m pytest --cov"),
        ("check", "ruff format --check"),
        ("check", "lint-imports"),
        ("check", "mypy common config"),
        ("bench", "bench/"),
        ("run", "deploy/supervisord.conf"),
        ("env", '-c "constraints/'),
        ("clean", "rm -rf build"),
    ],
)
def test_every_promised_target_is_there(tmp_path: Path, target: str, does: str) -> None:
    """Each target runs its command; without an environment it makes one first, pinned."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    result = make("-n", target, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert does in result.stdout
    if target != "clean":
        assert "-m venv .venv" in result.stdout
    if target == "demo":
        assert "[dev]" not in result.stdout  # the demo's environment is the small one


@needs_make
def test_another_python_is_refused_in_one_line(tmp_path: Path) -> None:
    """Outside 3.10 to 3.12: the version, the way out, no environment left behind."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    program = (
        "import sys, collections\n"
        "V = collections.namedtuple('V', 'major minor micro')\n"
        "sys.version_info = V(3, 13, 0)\n"
        "exec(sys.argv[2])\n"
    )
    (tmp_path / "future.py").write_text(program)
    future = tmp_path / "python3.13"
    future.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "future.py"}" "$@"\n')
    future.chmod(0o755)
    result = make("env", f"PYTHON={future}", cwd=tmp_path)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "3.10 to 3.12" in said[0]
    assert "3.13" in said[0]
    assert not (tmp_path / ".venv").exists()


def test_ci_script_runs_the_test_command_without_standard_input(tmp_path: Path) -> None:
    """With everything installed it runs `make test` at once, with CI set."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "\nmake test\n" in text
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("rabbitmq-server", "redis-server", "python3", "apt-get", "sudo"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
    (tools / "make").write_text('#!/bin/sh\necho "make $* CI=$CI"; cat\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    result = subprocess.run(
        ["bash", str(script)],
        env={"PATH": f"{tools}:{os.environ['PATH']}"},
        input="never read",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "make test CI=true" in result.stdout
    assert "never read" not in result.stdout


def test_pre_commit_runs_in_seconds() -> None:
    """Formatting and spelling of the files of a commit; types and tests belong to make."""
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["id"] for repo in content["repos"] for hook in repo["hooks"]]
    assert hooks == ["ruff", "ruff-format", "typos"]
    assert all(repo["repo"] == "local" for repo in content["repos"])
