"""`infer_net.py` with the daemon's settings: raw media to tags, as `insighttag tag` gives them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import infer_net
from config.load import load_settings
from config.settings import Settings
from fusion.infer.options import infer_settings
from scripts.cli import run
from tests.support.scripts import infer_rig as rig
from tests.support.tiny_models import tiny_site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of small extractors, their bundle, and three posts with pictures."""
    folder = tmp_path_factory.mktemp("e2e")
    rules = {"tags": str(folder / "tags.yaml"), "min_tags": 1, "max_tags": 2}
    (folder / "tags.yaml").write_text("hide: [dog]\nmap: {Sea: {id: s1, tags: [sea]}}\n")
    fusion = {"bundle": str(folder / "bundle"), **rules}
    tiny_site(folder, infer={"progress": False}, fusion=fusion).rename(folder / "infer.yaml")
    (folder / "media").mkdir()
    chance = np.random.default_rng(1)
    for i in range(3):
        picture = chance.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / "media" / f"{i}.png"), picture)
    posts = [
        {"post_id": f"p{i}", "text": f"cat {i}", "images": [f"media/{i}.png"], "labels": ["cat"]}
        for i in range(3)
    ]
    (folder / "posts.json").write_text(json.dumps(posts))
    return folder


def untimed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the part that `insighttag tag` and `infer_net.py` share, scores to six places."""
    return [
        {
            "post_id": r["post_id"],
            "version": r["version"],
            "rules": r["rules"],
            "modalities": r["modalities"],
            "tags": [(t["id"], t["name"], round(t["score"], 6)) for t in r["tags"]],
        }
        for r in results
    ]


@pytest.mark.usefixtures("quick_processes")
def test_raw_media_equal_insighttag_tag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Local paths beside the file; metrics where labels are; one process or two."""
    assert (
        run(["tag", str(folder / "posts.json"), "--json", "--config", str(folder / "infer.yaml")])
        == 0
    )
    expected = untimed(json.loads(capsys.readouterr().out))
    assert all(post["tags"] for post in expected)
    assert rig.infer(folder, "--output", str(folder / "one.jsonl")) == 0
    assert "posts 3  labelled 3  gap " in capsys.readouterr().out
    assert untimed(rig.lines(folder / "one.jsonl")) == expected
    assert rig.infer(folder, "--output", str(folder / "two.jsonl"), "--processes", "2") == 0
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()


def test_a_post_with_nothing_is_named_or_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"post_id": "a", "text": "cat"},
        {"post_id": "b"},
        {"post_id": "c", "images": ["media/none.png"]},
    ]
    (folder / "bad.jsonl").write_text("".join(json.dumps(post) + "\n" for post in bad))
    output = ["--output", str(folder / "bad.out")]
    assert rig.infer(folder, *output, posts="bad.jsonl") == 2
    assert "images.0: no such file: media/none.png" in capsys.readouterr().err
    assert rig.infer(folder, *output, "--skip_bad", posts="bad.jsonl") == 0
    listed = rig.lines(folder / "bad.out.skipped.jsonl")
    assert [line["post_id"] for line in listed] == ["b", "c"]
    assert "NothingUsable" in listed[0]["reason"]
    assert [line["post_id"] for line in rig.lines(folder / "bad.out")] == ["a"]


def test_media_are_tagged_anew_each_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Media that failed before may be there now."""
    picture, posts = folder / "media" / "late.png", folder / "late.json"
    posts.write_text(json.dumps([{"post_id": "p", "text": "cat", "images": ["media/late.png"]}]))
    picture.write_bytes(b"cut off")
    output = folder / "late.jsonl"
    assert rig.infer(folder, "--output", str(output), posts=posts.name) == 0
    [before] = rig.lines(output)
    picture.write_bytes((folder / "media" / "0.png").read_bytes())
    assert rig.infer(folder, "--output", str(output), posts=posts.name) == 0
    assert "complete already" not in capsys.readouterr().out
    [after] = rig.lines(output)
    assert (before["modalities"]["image"], after["modalities"]["image"]) == ("failed", "ok")


def test_other_extractors_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one line; lists without media too."""
    assert rig.infer(folder, "--set", "features.image.weights=random:2") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "image" in said
    assert "fusion.bundle" in said
    (folder / "ids.txt").write_text("p1\n")
    assert rig.infer(folder, posts="ids.txt") == 2
    assert "names no media" in capsys.readouterr().err


def test_the_daemons_default_config_is_one_for_raw_media(project_root: Path) -> None:
    """The same file serves both, and options reach their keys."""
    config = project_root / "config" / "infer_config_e2e.yaml"
    assert load_settings(config).infer.processes == 1
    words = ["--infer_config", str(config), "--input", "x.json", "--processes", "2"]
    settings = infer_settings(infer_net.SCRIPT.read([*words, "--output", "2026", "--n_gpus", "0"]))
    assert isinstance(settings, Settings)
    assert (settings.infer.processes, settings.infer.output) == (2, "2026")
    assert settings.infer.n_gpus == 0
    plain = project_root / "config" / "infer_config.yaml"
    other = infer_settings(
        infer_net.SCRIPT.read(["--infer_config", str(plain), "--input", "x.json"])
    )
    assert not isinstance(other, Settings)
