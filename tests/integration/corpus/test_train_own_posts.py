"""``insighttag train`` and ``tag`` on a folder of pictures and a table of labels."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from config.features import ImageSettings
from scripts.cli import run
from tests.support.corpus.extraction_corpus import write_config
from tests.support.media import solid, write_png
from tests.support.services import wait_until

# Only runs that are interrupted have workers of their own: others would test nothing more.
pytestmark = pytest.mark.usefixtures("models_in_this_process")
ROOT = Path(__file__).resolve().parents[3]
COLOURS = {"red": (210, 40, 40), "green": (40, 190, 50), "blue": (40, 60, 210)}
COUNT = 48
HOG = ImageSettings(arch="hog", image_size=32, precision="fp32")


def paint(path: Path, colour: tuple[int, ...], random: np.random.Generator) -> None:
    pixels = solid(32 + int(random.integers(20)), 40, colour).astype(int)
    noise = random.integers(-30, 30, pixels.shape)
    write_png(path, np.clip(pixels + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours, their labels, three more, and small extractors with HOG."""
    root, random = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in ("pictures", "new"):
        (root / name).mkdir()
    rows = ["file,labels"]
    for number in range(COUNT):
        colour = [*COLOURS][number % 3]
        paint(root / "pictures" / f"{number:02}.png", COLOURS[colour], random)
        rows.append(f"{number:02}.png,{colour}" + ("|cold" if colour == "blue" else ""))
    for colour, rgb in COLOURS.items():
        paint(root / "new" / f"{colour}.png", rgb, random)
    (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    write_config(root, image=HOG)
    return root


def words(folder: Path, *more: str) -> list[str]:
    files = [str(folder / name) for name in ("pictures", "labels.csv", "mine", "tiny.yaml")]
    pairs = zip(("--labels", "--out", "--config"), files[1:], strict=True)
    return ["train", files[0], *(word for pair in pairs for word in pair), *more]


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Path, int]:
    """Interrupt a training, run it again to its end, and return its first feature files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.cli", *words(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    features = folder / "mine" / "features"
    wait_until(lambda: any(features.rglob("*.safetensors")), 240, "the first features")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    last = errors.splitlines()[-1]
    assert last == "insighttag: train: interrupted; the same command continues where it stopped"
    assert not (folder / "mine" / "bundle").exists()
    first = {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
    assert run(words(folder)) == 0
    return first


def test_an_interrupted_training_goes_on(folder: Path, trained: dict[Path, int]) -> None:
    """Extracted features stay; bundle, report and figures of the test posts are there."""
    assert trained
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in trained.items())
    mine = folder / "mine"
    assert len([*(mine / "features").rglob("*.safetensors")]) == COUNT
    assert (mine / "train" / "latest" / "report" / "report.html").exists()
    assert len((mine / "test_tags.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def test_new_pictures_get_their_tags(
    folder: Path, trained: dict[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings beside the bundle; a killed run goes on behind its last whole line."""
    out, bundle = folder / "tags.jsonl", folder / "mine" / "bundle"
    command = ["tag", str(folder / "new"), "--out", str(out), "--bundle", str(bundle)]
    assert run(command) == 0
    whole = out.read_bytes()
    results = [json.loads(line) for line in whole.splitlines()]
    tags = {each["post_id"]: {tag["name"] for tag in each["tags"]} for each in results}
    assert tags == {"blue.png": {"blue", "cold"}, "green.png": {"green"}, "red.png": {"red"}}
    out.write_bytes(whole[:-20])
    assert run(command) == 0
    assert out.read_bytes() == whole
    capsys.readouterr()
    for content, why in (
        (b"hello\n", "line 1: is not a result of insighttag tag"),
        (whole.replace(b'"version": "', b'"version": "x'), "line 1: is by the bundle insight x"),
    ):
        out.write_bytes(content)
        assert run(command) == 2
        assert why in capsys.readouterr().err
        assert out.read_bytes() == content
    assert run([*command, "--restart"]) == 0
    assert out.read_bytes() == whole


def test_a_second_run_does_nothing_anew(
    folder: Path, trained: dict[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json its files and figures are one object, and the rest is on standard error."""
    bundle = (folder / "mine" / "bundle" / "bundle.yaml").read_bytes()
    assert run(words(folder, "--json")) == 0
    assert (folder / "mine" / "bundle" / "bundle.yaml").read_bytes() == bundle
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["bundle"] == str(folder / "mine" / "bundle")
    assert 0 < report["metrics"]["gap"] <= 1
    assert 0 < report["test"]["gap"] <= 1
    assert "bundle   " in printed.err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--set", "trainer.epochs=3"], "was started with trainer.epochs nothing, this run has 3"),
        (
            ["--set", "features.image.image_size=64"],
            "features.image.image_size 32, this run has 64",
        ),
        (["--valid", "0.2"], "was started with --valid 0.1, this run has 0.2"),
        (["--set", "trainr.epochs=3"], "--set: trainr: unknown key; did you mean 'trainer'?"),
    ],
)
def test_other_settings_for_the_same_folder_are_named(
    folder: Path,
    trained: dict[Path, int],
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    named: str,
) -> None:
    capsys.readouterr()
    assert run(words(folder, *more)) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_other_posts_for_the_same_folder_are_named(
    folder: Path, trained: dict[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    other = words(folder)
    other[1] = str(folder / "new")
    assert run(other) == 2
    assert f"POSTS {folder / 'pictures'}, this run has {folder / 'new'}" in capsys.readouterr().err
    extra = folder / "pictures" / "extra.png"
    write_png(extra, solid(20, 20))
    try:
        assert run(words(folder)) == 2
        assert "has changed since --out" in capsys.readouterr().err
    finally:
        extra.unlink()


def test_texts_make_their_own_encoder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of texts and ``arch: tfidf`` need no weights; words of training posts are counted.

    The folder may be moved: its settings name its files by relative paths.
    """
    texts = {"cat": "a small grey cat", "dog": "the big brown dog", "bird": "birds sing songs"}
    rows = [
        f"{name}-{number},{text} number {number},{name}"
        for number in range(14)
        for name, text in texts.items()
    ]
    table = tmp_path / "posts.csv"
    table.write_text("\n".join(["id,text,labels", *rows]), encoding="utf-8")
    config = tmp_path / "text.yaml"
    content = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    content["features"]["text"] = {"arch": "tfidf"}
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    out = tmp_path / "mine"
    assert run(["train", str(table), "--out", str(out), "--config", str(config)]) == 0
    assert "gap 1.0000" in capsys.readouterr().out
    new = tmp_path / "new.csv"
    new.write_text("id,text\n1,my grey cat\n", encoding="utf-8")
    moved = out.rename(tmp_path / "moved")
    assert run(["tag", str(new), "--json", "--bundle", str(moved / "bundle")]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [tag["name"] for tag in result["tags"]] == ["cat"]


def test_a_folder_that_is_not_ours_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    command = words(folder)
    command[command.index("--out") + 1] = str(tmp_path)
    assert run(command) == 2
    assert "holds files that insighttag train has not written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--labels", "none.csv"], "none.csv: no such file"),
        (["--set", "trainer.epoch=3"], "trainer.epoch: unknown key; did you mean 'epochs'?"),
        (["--set", "model.name=best"], "model.name"),
        (["--set", "data.train=my.json"], "data.train: insighttag train sets it itself"),
        (["--set", "data.modalities=[smell]"], "data.modalities"),
        (["--set", "features.image.size=3"], "features.image.size: unknown key"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    wrong: list[str],
    named: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mine"
    assert run([*words(folder), "--out", str(out), *wrong]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_posts_without_labels_are_refused_and_can_be_mended(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is not bound to arguments that gave nothing."""
    config = str(folder / "tiny.yaml")
    bare = ["train", str(folder / "pictures"), "--out", str(tmp_path / "mine"), "--config", config]
    assert run(bare) == 2
    assert "no post has labels: --labels names a table" in capsys.readouterr().err
    assert run([*bare, "--labels", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: no such file" in capsys.readouterr().err
