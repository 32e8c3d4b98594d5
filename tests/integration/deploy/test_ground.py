"""The ground that people stand on: make targets, the CI script, the hooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.processes import ran

ROOT = Path(__file__).resolve().parents[3]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
    return ran("make", "--no-print-directory", *words, cwd=cwd, env=environment)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what make reads, and no environment."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_make
def test_every_promised_target_is_there(checkout: Path) -> None:
    demo = make("-n", "demo", cwd=checkout).stdout
    assert "-m demo" in demo
    assert "-m venv .venv" in demo
    assert "[dev]" not in demo  # the demo's environment is the small one
    result = make("-n", "test", "coverage", "bench", "run", "env", "clean", cwd=checkout)
    assert result.returncode == 0, result.stderr
    for does in (
        "-m pytest --cov",
        "ruff format --check",
        "lint-imports",
        "mypy common config",
        "bench/",
        "deploy/supervisord.conf",
        '-c "constraints/',
        "rm -rf build",
    ):
        assert does in result.stdout


@needs_make
def test_another_python_is_refused_in_one_line(checkout: Path) -> None:
    """Outside 3.10 to 3.12: the version, the way out, no environment left behind."""
    program = (
        "import sys, collections\n"
        "V = collections.namedtuple('V', 'major minor micro')\n"
        "sys.version_info = V(3, 13, 0)\n"
        "exec(sys.argv[2])\n"
    )
    (checkout / "future.py").write_text(program)
    future = checkout / "python3.13"
    future.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{checkout / "future.py"}" "$@"\n')
    future.chmod(0o755)
    result = make("env", f"PYTHON={future}", cwd=checkout)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "3.10 to 3.12" in said[0]
    assert "3.13" in said[0]
    assert not (checkout / ".venv").exists()


def test_ci_script_runs_the_test_command_without_standard_input(tmp_path: Path) -> None:
    """With everything installed it runs `make test` at once, with CI set."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "\nmake test\n" in script.read_text(encoding="utf-8")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("rabbitmq-server", "redis-server", "python3", "apt-get", "sudo"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
    (tools / "make").write_text('#!/bin/sh\necho "make $* CI=$CI"; cat\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    result = ran("bash", str(script), env=path, input="never read")
    assert result.returncode == 0, result.stderr
    assert "make test CI=true" in result.stdout
    assert "never read" not in result.stdout


def test_pre_commit_runs_in_seconds() -> None:
    """Formatting and spelling of the files of a commit; types and tests belong to make."""
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["id"] for repo in content["repos"] for hook in repo["hooks"]]
    assert hooks == ["ruff", "ruff-format", "typos"]
    assert all(repo["repo"] == "local" for repo in content["repos"])
