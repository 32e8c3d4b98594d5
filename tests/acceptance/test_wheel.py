"""The wheel, installed into an environment of its own, far from the checkout.

The environment has the dependencies of this one, and nothing of ours beside the wheel; the working
folder has modules with the names that our packages have in a checkout.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_house_style import PACKAGES, ROOT, tracked_files

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
BUILD = "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        inside = path.relative_to(ROOT)
        if path.is_file() and (len(inside.parts) == 1 or inside.parts[0] in PACKAGES):
            (folder / "source" / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "source" / inside)
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("insighttag-*.whl"))


@pytest.fixture(scope="module")
def work(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the environment and a person's own modules."""
    folder = tmp_path_factory.mktemp("elsewhere")
    env = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    (site,) = env.glob("lib/*/site-packages")
    # A path alone: the .pth files in it, one of which leads to the checkout, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--offline", "--quiet"]
    subprocess.run([*uv, "--python", str(env / "bin" / "python"), str(wheel)], check=True)
    for name in PACKAGES:
        if name != "insighttag":
            (folder / f"{name}.py").write_text("raise RuntimeError('somebody else')\n")
    return folder


def ran(work: Path, *command: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "INSIGHTTAG_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return subprocess.run(
        [str(work / "env" / "bin" / command[0]), *command[1:]],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_everything_is_inside_one_package_with_its_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"insighttag"}
    assert "insighttag = insighttag.__main__:main" in scripts
    ours = {path.relative_to(ROOT) for path in tracked_files()}
    # Containers are made of a checkout.
    ours = {path for path in ours if path.parts[1:2] not in {("compose",), ("docker",), ("helm",)}}
    expected = {
        str(path if path.parts[0] == "insighttag" else "insighttag" / path)
        for path in ours
        if path.parts[0] in PACKAGES or (len(path.parts) == 1 and path.suffix == ".py")
    }
    assert expected - names == set()


def test_commands_run_far_from_the_checkout(work: Path) -> None:
    """Also with a mistake: one line, and no traceback."""
    version = ran(work, "insighttag", "--version")
    assert version.stdout.startswith("insighttag "), version.stderr
    doctor = ran(work, "insighttag", "doctor", "--quick", "--set", "features.preset=small")
    assert "Traceback" not in doctor.stderr
    assert doctor.stdout or doctor.stderr.count("\n") == 1
    init = ran(work, "insighttag", "init", "project")
    assert (init.returncode, init.stderr.count("Traceback")) == (0, 0), init.stderr
    mistake = ran(work, "insighttag", "tag", "none.png", "--bundle", "none")
    assert (mistake.returncode, mistake.stderr.count("\n")) == (2, 1), mistake.stderr


def test_the_notebook_runs_and_the_command_gives_its_tags(work: Path) -> None:
    """The folder of the training is moved between them; one process, since it loads torch."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells), "strip the outputs"
    words = ["tag", "pictures/00.png", "--json", "--bundle", "moved/bundle"]
    code.append("Path('mine').rename('moved'); print('tags')")
    code.append(f"from insighttag.scripts.cli import run; assert run({words}) == 0")
    script = work / "notebook.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    done = ran(work, "python", str(script))
    assert done.returncode == 0, done.stderr
    notebook, tags = done.stdout.split("\ntags\n")
    assert "images: must be a list" in notebook
    (result,) = json.loads(tags)
    assert [tag["name"] for tag in result["tags"]] == ["red"]
