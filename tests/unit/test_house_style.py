"""The rules of the house that no linter knows: sizes, asserts, prints, and machine paths."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "common", "config", "corpus", "demo", "deploy", "extractors", "fusion", "insighttag", "king",
    "scripts", "web", "workers",
)  # fmt: skip
BESIDE = ("tests", "bench", "docs")
MAX_LINES, MAX_TOP_LINES, MAX_FUNCTION_LINES = 700, 60, 65
# Paths that exist on one machine only; /tmp and /dev are everywhere.
MACHINE_PATH = re.compile(r"""(?<![\w.:/])/(?:home|root|Users|work|mnt|opt|data)/\w+""")


def modules() -> list[Path]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [*paths, *sorted(ROOT.glob("*.py"))]


def modules_beside() -> list[Path]:
    """Every module of the tests and the benchmarks."""
    return [path for folder in BESIDE for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in modules()]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_product_module_is_over_700_lines() -> None:
    sizes = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in modules()}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_top_level_scripts_are_thin() -> None:
    sizes = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("*.py")}
    assert {path: size for path, size in sizes.items() if size >= MAX_TOP_LINES} == {}


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: arguments may be many and must be described."""
    size = (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return size
    return size - ((node.body[0].end_lineno or 0) - node.body[0].lineno + 1)


def test_no_function_is_far_over_50_lines() -> None:
    long = {
        f"{name(path)}:{node.name}": size
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (size := code_lines(node)) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_docstring_begins_with_a_question() -> None:
    """It begins with a verb, or names the thing."""
    question = re.compile(r'^\s*"""(What|Which|Whether)\b', re.M)
    paths = [*modules(), *modules_beside()]
    assert [name(path) for path in paths if question.search(path.read_text("utf-8"))] == []


def test_no_assert_validates_in_product_code() -> None:
    """``python -O`` would remove the check."""
    asserts = [
        f"{name(path)}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []


def test_print_only_in_command_output() -> None:
    """Outside the commands and their packages, messages go to the log."""
    calls = [
        f"{name(path)}:{node.lineno}"
        for path, tree in trees()
        if path.parent != ROOT
        and path.relative_to(ROOT).parts[0] not in {"scripts", "demo", "corpus"}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "breakpoint", "input"}
    ]
    assert calls == []


def test_every_module_and_package_says_its_job() -> None:
    """A docstring atop every module; a package marker may be empty of code, not of words."""
    assert [name(path) for path, tree in trees() if not ast.get_docstring(tree)] == []


def tracked_files() -> list[Path]:
    """Return the files of a clone: tracked ones and those that are about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / part for part in listed.stdout.decode().split("\0") if part]


def test_no_path_of_one_machine() -> None:
    lines_with_paths: list[str] = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        lines_with_paths += [
            f"{name(path)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line) and path != Path(__file__).resolve()
        ]
    assert lines_with_paths == []


def test_constraints_pin_every_direct_dependency() -> None:
    """Each supported Python has a lock file with every requirement of setup.cfg, and no host."""
    import configparser

    from packaging.requirements import Requirement

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    blocks = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    required = [
        Requirement(line.strip()) for block in blocks for line in block.splitlines() if line.strip()
    ]
    for python in ("3.10", "3.11", "3.12"):
        names = {
            it.name.lower()
            for it in required
            if it.marker is None or it.marker.evaluate({"python_version": python})
        }
        text = (ROOT / "constraints" / f"py{python}.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!+]+", line) for line in lines), python
        pinned = {line.split("==")[0] for line in lines}
        assert {w.replace("_", "-") for w in names} - pinned == set(), python
