"""Benchmarks run as plain scripts, and their short forms measure; those are called in this process.

Each in a process of its own would load torch for seconds.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bundle_swaps
import forward
import gpu
import latency
import overhead
import peers
import pytest
import scale
import speed_of_light
from results_file import write_results
from rig import Site, site
from workloads import workload

from tests.support.processes import ROOT, ran

BENCH = ROOT / "bench"
SCRIPTS = sorted(str(p) for p in BENCH.glob("*.py") if "__main__" in p.read_text("utf-8"))

# All in one process, since each would load the same libraries, and our packages, which are
# installed. Of an earlier script no path and no module of the benchmarks or the tests is left.
PROGRAM = """
import contextlib, io, json, runpy, sys
from pathlib import Path
scripts, path, ended = sys.argv[1:], sys.path[1:], {}
apart = {"tests", *(path.stem for path in Path(scripts[0]).parent.iterdir())}
for script in scripts:
    sys.argv, sys.path[:] = [script, "--help"], [str(Path(script).parent), *path]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    ended[Path(script).name] = [code, said.getvalue()[:7]]
    for name in list(sys.modules):
        if name.partition(".")[0] in apart:
            del sys.modules[name]
print(json.dumps(ended))
"""


def test_every_benchmark_says_how_it_is_run(tmp_path: Path) -> None:
    """Neither their folder nor the project's is on the path before."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = ran(
        sys.executable, "-c", PROGRAM, *SCRIPTS, cwd=tmp_path, timeout_s=500, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {Path(script).name: [0, "usage: "] for script in SCRIPTS}


def test_a_case_on_a_gpu_that_fails_costs_no_other(tmp_path: Path) -> None:
    """A machine may be lent for minutes only: what was measured is written at once."""
    written: list[str] = []

    def broken() -> list[dict[str, Any]]:
        written.append((tmp_path / "gpu.json").read_text("utf-8"))
        raise RuntimeError("CUDA error")

    steps = {"first": lambda: [{"case": "first"}], "second": broken}
    steps["third"] = lambda: [{"case": "third"}]
    rows = gpu.run_all(steps, "cuda:0", tmp_path, time.monotonic() + 60)
    assert [row["case"] for row in json.loads(written[0])["results"]] == ["first"]
    assert [(row["case"], row.get("error")) for row in rows] == [
        ("first", None),
        ("second", "RuntimeError: CUDA error"),
        ("third", None),
    ]
    [late] = gpu.run_all({"first": steps["first"]}, "cuda:0", tmp_path, time.monotonic() - 1)
    assert "--minutes" in late["error"]


def test_results_of_a_packed_tree_name_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKED_COMMIT", "0123456789ab")
    file = write_results("gpu", 1, [], tmp_path)
    assert json.loads(file.read_text("utf-8"))["commit"] == "0123456789ab"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A daemon for all of them: each would take ten CPU-seconds to load its models."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # a rig sets it for what it starts
        made = workload("tiny", folder)
        with site("embedded", made.settings, folder) as place, place.kings():
            yield place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bench", "figure"),
    [
        (overhead, "posts_per_s"),
        (peers, "posts_per_s"),
        (speed_of_light, "ratio"),
        (latency, "p50_ms"),
        (scale, "posts_per_s"),
        (bundle_swaps, "swaps"),
        (forward, "items_per_s"),
    ],
)
def test_small_run_measures_every_case_and_writes_it(
    bench: Any, figure: str, served: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hasattr(bench, "site"):
        monkeypatch.setattr(bench, "site", lambda *_: nullcontext(served))
    assert bench.main(["--small", f"--out={tmp_path}"]) == 0
    written = json.loads((tmp_path / f"{bench.__name__}.json").read_text(encoding="utf-8"))
    assert {"machine", "date", "commit", "runs"} < written.keys()
    assert written["results"]
    assert all(row[figure] > 0 for row in written["results"])
    assert all(row.get("growth", 0) < 0.01 for row in written["results"])  # of resident memory
