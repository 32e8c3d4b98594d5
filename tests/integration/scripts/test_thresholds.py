"""``insighttag bundle thresholds``: what is shown, what a change writes, each mistake's line."""

import json
from pathlib import Path

import pytest
import torch

from common.post_set import PostSet
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import newest_version
from scripts.cli import run
from tests.support.fusion import support
from tests.support.scripts import infer_rig as rig

METRICS = {"gap": 0.9, "f1_micro": 0.5, "accuracy": 0.8}


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled posts with their feature files."""
    return rig.make(tmp_path_factory.mktemp("posts"), 30)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    support.write_bundle(tmp_path / "bundle", "gmu", model=support.model("gmu"), metrics=METRICS)
    return tmp_path / "bundle"


def values(bundle: Path) -> list[float]:
    return [round(float(value), 6) for value in load_bundle(bundle).thresholds]


def test_a_change_is_a_new_version(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only bundle.yaml is written; the version before is kept, and metrics at it are gone."""
    before, others = newest_version(bundle), ("model.safetensors", "labels.json")
    stats = [(bundle / name).stat().st_ino for name in others]
    command = ["bundle", "thresholds", str(bundle)]
    assert run([*command, "--set", "tag1=0.4", "--set", "tag3=.125"]) == 0
    after = newest_version(bundle)
    assert values(bundle) == [0.5, 0.4, 0.5, 0.125, 0.5, 0.5]
    assert str(after) > str(before)
    assert str(after)[-8:] == str(before)[-8:]
    assert [(bundle / name).stat().st_ino for name in others] == stats
    assert load_bundle(bundle).metrics == {"gap": 0.9}
    copy = bundle.with_name(f"bundle.{before}")
    assert values(copy) == [0.5] * 6
    assert f"kept in {copy}" in capsys.readouterr().out
    assert run([*command, "--set", "tag1=0.4"]) == 0
    assert "has these thresholds already" in capsys.readouterr().out
    assert newest_version(bundle) == after


@pytest.mark.parametrize("form", ["csv", "json"])
def test_what_is_written_is_read_again(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """A file may hold some of the tags; --set goes over it, and --json is a file too."""
    command, file = ["bundle", "thresholds", str(bundle)], tmp_path / f"t.{form}"
    assert run([*command, "--set", "tag0=0.25", "--out", str(file)]) == 0
    file.write_text("\ufeff" + file.read_text().replace("0.25", "0.75"))
    capsys.readouterr()
    assert run([*command, "--file", str(file), "--set", "tag5=1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["version"] == newest_version(bundle)
    assert list(shown["thresholds"].values()) == values(bundle) == [0.75, *[0.5] * 4, 1.0]
    (tmp_path / "shown.json").write_text(json.dumps({**shown, "thresholds": {"tag5": 0}}))
    assert run([*command, "--file", str(tmp_path / "shown.json")]) == 0
    assert values(bundle) == [0.75, *[0.5] * 4, 0.0]


def test_thresholds_for_a_precision_on_posts_that_are_new(
    bundle: Path, posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each tag is given as often as that share of it is right; learned posts fit nothing."""
    fit = ["bundle", "thresholds", str(bundle), "--from-data", str(posts / "posts.json")]
    assert run([*fit, "--precision", "0.5", "--min-positives", "1"]) == 0
    assert "fitted to 30 posts: f1 " in capsys.readouterr().err
    assert rig.infer(posts, "--best_model", str(bundle), "--output", str(posts / "out.jsonl")) == 0
    right: dict[str, list[bool]] = {}
    for line in rig.lines(posts / "out.jsonl"):
        for tag in line["tags"]:
            right.setdefault(tag["name"], []).append(tag["name"] in line["labels"])
    assert right
    assert {
        tag: sum(each) / len(each) for tag, each in right.items() if 2 * sum(each) < len(each)
    } == {}
    learned = PostSet.of(post.post_id for post in support.records(posts / "posts.json"))
    support.write_bundle(bundle, "gmu", model=support.model("gmu"), learned_from=learned)
    capsys.readouterr()
    assert run(fit) == 2
    assert "holds no labelled post that no part of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--set", "tga1=0.4"], "--set: the bundle has no tag 'tga1'; did you mean 'tag1'?"),
        (["--set", "tag1"], "--set 'tag1': write it as TAG=0.4"),
        (["--set", "tag1=1.5"], "--set: tag1: must be a number from 0 to 1, got '1.5'"),
        (["--set", "tag1=nan"], "--set: tag1: must be a number from 0 to 1, got 'nan'"),
        (["--file", "{}/none.csv"], "--file {}/none.csv: cannot be read: No such file"),
        (["--file", "{}/semicolon.csv"], "semicolon.csv: the first line must be tag,threshold"),
        (["--file", "{}/twice.csv"], "twice.csv: row 3: tag 'tag1' appears twice"),
        (["--file", "{}/list.json"], "list.json: must map tags to thresholds"),
        (["--file", "{}/yes.json"], "yes.json: tag1: must be a number from 0 to 1, got True"),
        (["--out", "x.txt", "--set", "tag1=0.1"], "--out x.txt: must be a .csv or .json file"),
        (["--precision", "0.9"], "--precision goes with --from-data F"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    (tmp_path / "semicolon.csv").write_text("tag;threshold\ntag1;0,4\n")
    (tmp_path / "twice.csv").write_text("tag,threshold\ntag1,0.4\ntag1,0.5\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "yes.json").write_text('{"tag1": true}')
    about = (bundle / "bundle.yaml").read_bytes()
    arguments = [word.format(tmp_path) for word in words]
    assert run(["bundle", "thresholds", str(bundle), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line.format(tmp_path) in err
    assert (bundle / "bundle.yaml").read_bytes() == about
    assert [path.name for path in tmp_path.glob("bundle*")] == ["bundle"]
