"""Setuptools' ``build_py`` for a wheel with all our packages inside the package ``insighttag``.

The repository has top-level packages with common names: ``config``, ``common``, ``scripts``. In
site-packages, or in a notebook, other modules with such a name would hide ours, or ours would hide
them. So the wheel has ``insighttag.config`` and so on, and the imports are rewritten. Nothing else
is changed; the build fails on an import that cannot be rewritten.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

INTO = "insighttag"


class BuildPy(build_py):  # type: ignore[misc]
    """Build as usual, then move the other packages into ``insighttag``."""

    def run(self) -> None:
        super().run()
        # In an editable installation the files of the checkout are what is imported.
        if not getattr(self, "editable_mode", False):
            move_all(Path(self.build_lib), _names(self.distribution))


class EggInfo(egg_info):  # type: ignore[misc]
    """The usual metadata, with ``insighttag`` as the only top-level name."""

    def run(self) -> None:
        super().run()
        Path(self.egg_info, "top_level.txt").write_text(f"{INTO}\n", encoding="utf-8")


def move_all(built: Path, names: Sequence[str]) -> None:
    """Move the named packages and modules into ``insighttag``, and rewrite all their imports."""
    others = [name for name in names if name != INTO]
    for name in others:
        for source in (built / name, built / f"{name}.py"):
            if source.exists():
                target = built / INTO / source.name
                if target.is_dir():
                    shutil.rmtree(target)
                source.replace(target)
    for path in sorted((built / INTO).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        moved = rewritten(text, others, str(path.relative_to(built)))
        if moved != text:
            path.write_text(moved, encoding="utf-8")


def rewritten(text: str, names: Sequence[str], where: str) -> str:
    """Return a module's text with ``insighttag.`` in front of our names, where they are imported.

    That is ``from NAME...``, ``import NAME``, a string that is ``NAME.module:attribute``, and a
    string NAME or NAME.module behind ``"-m"``, the option of Python. ``sys.path.insert`` of scripts
    goes.

    Raises:
        SyntaxError: ``import NAME.module``, which binds NAME and imports something else.
    """
    if INTO in names:
        raise ValueError(f"{INTO} stays where it is")
    ours = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:\.\w+)*")
    named = re.compile(rf"{ours.pattern}:\w+")
    tree, lines = ast.parse(text, where), text.encode("utf-8").splitlines(keepends=True)
    places: list[tuple[int, int, str]] = []
    prefix = f"{INTO}."
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), level=0) if ours.fullmatch(module):
                places.append((node.lineno, node.col_offset + len("from "), prefix))
            case ast.Import(names=[ast.alias(name=str(name))]) if name in names:
                places.append((node.lineno, node.col_offset, f"from {INTO} "))
            case ast.Import() if any(ours.fullmatch(each.name) for each in node.names):
                raise SyntaxError(f"{where}:{node.lineno}: write `from ... import ...`")
            case ast.Constant(value=str(value)) if named.fullmatch(value):
                places.append((node.lineno, node.col_offset + 1, prefix))
            case ast.List() | ast.Tuple() | ast.Call():
                places += [
                    (each.lineno, each.col_offset + 1, prefix)
                    for each in _modules_to_run(node)
                    if ours.fullmatch(str(each.value))
                ]
    for node in tree.body:  # scripts that find the rest of a checkout by their own place
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("sys.path.insert("):
            if node.lineno != node.end_lineno:
                raise SyntaxError(f"{where}:{node.lineno}: write it in one line")
            lines[node.lineno - 1] = b"pass\n"
    for line, column, inserted in sorted(set(places), reverse=True):
        old = lines[line - 1]
        lines[line - 1] = old[:column] + inserted.encode() + old[column:]
    return b"".join(lines).decode("utf-8")


def _modules_to_run(node: ast.List | ast.Tuple | ast.Call) -> Iterator[ast.Constant]:
    parts = node.args if isinstance(node, ast.Call) else node.elts
    for option, module in pairwise(parts):
        if (
            isinstance(option, ast.Constant)
            and option.value == "-m"
            and isinstance(module, ast.Constant)
        ):
            yield module


def _names(distribution: Any) -> list[str]:
    packages = {name.partition(".")[0] for name in distribution.packages or ()}
    return sorted(packages | set(distribution.py_modules or ()))
