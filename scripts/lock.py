"""Pin every direct and indirect dependency of the package, its extras included.

Writes `constraints/py3.X.txt` for the Python that runs it. Resolves with pip, installs nothing.
"""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(setup: Path) -> list[str]:
    """What setup.cfg asks for: the dependencies and those of every extra."""
    parser = configparser.ConfigParser()
    parser.read(setup, encoding="utf-8")
    blocks = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def pins(report: Path) -> dict[str, str]:
    """Name ─► version out of pip's installation report."""
    content = json.loads(report.read_text(encoding="utf-8"))
    found = (entry["metadata"] for entry in content["install"])
    return {re.sub(r"[-_.]+", "-", meta["name"]).lower(): meta["version"] for meta in found}


def render(python: str, pinned: dict[str, str]) -> str:
    """The constraints file: one ``name==version`` a line, in order."""
    head = (
        f"# Python {python} on Linux x86_64: all dependencies, direct and indirect, of the\n"
        "# package and its extras. Made by `make lock`, used by `make env`: `pip install -c`.\n"
    )
    return head + "".join(f"{name}=={pinned[name]}\n" for name in sorted(pinned))


def main() -> int:
    """Resolve with pip and write the file."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = ROOT / "constraints" / f"py{python}.txt"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command = [*pip, "--report", str(report), *requirements(ROOT / "setup.cfg")]
        result = subprocess.run(command, check=False)  # noqa: S603 - pip of this interpreter
        if result.returncode:
            return 1
        target.write_text(render(python, pins(report)), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
