"""Commands on bundles, and `insighttag inspect`."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw, ImageFont

from common.errors import BundleError
from config.features import FeatureSettings
from config.labels import LabelMap
from config.settings import DecodeSettings
from extractors.media.decode import decode_media
from fusion.bundle import folder as folder_module
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import MOST_KEPT, kept_bundles, newest_version, put_bundle, replacing
from fusion.data.dataset import FeatureFiles
from fusion.infer.inferer import Inferer
from scripts.cli import run
from tests.support import media
from tests.support.fusion import support

OLD, NEW = "20260101T000000Z", "20260201T000000Z"


class Shop:
    """A folder with bundles, one of which is served."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.served = folder, folder / "insight"

    def write(self, name: str, made_at: str, **changes: Any) -> Path:
        folder = self.folder / name
        version = support.write_bundle(folder, **changes)
        about = folder / "bundle.yaml"
        text = about.read_text(encoding="utf-8")
        about.write_text(text.replace(version, f"{made_at}{version[-9:]}"), encoding="utf-8")
        return folder

    def run(self, *words: str) -> int:
        return run(["bundle", *words, "--set", f"fusion.bundle={self.served}"])


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    shop.write("insight", OLD, metrics={"gap": 0.7})
    shop.write("new", NEW, metrics={"gap": 0.8})
    return shop


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_list_names_every_kind_of_bundle(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.run("shadow", str(shop.folder / "new")) == 0
    assert shop.run("use", str(shop.folder / "new")) == 0
    (shop.write("broken", "20260102T000000Z") / "labels.json").unlink()
    capsys.readouterr()
    assert shop.run("list", "--json") == 0
    by_name = {Path(each["folder"]).name: each for each in printed(capsys)}
    copy = next(name for name in by_name if name.startswith("insight.2026"))
    states = {name: each["state"] for name, each in by_name.items()}
    assert states == {
        "broken": "",
        "insight": "served",
        copy: "kept",
        "insight.shadow": "shadow",
        "new": "",
    }
    assert by_name["insight"]["gap"] == 0.8
    assert by_name[copy]["gap"] == 0.7
    assert by_name["insight"]["version"] == newest_version(shop.folder / "new")
    assert "labels.json: is missing" in by_name["broken"]["error"]
    assert shop.run("list") == 0
    assert "labels.json: is missing" in capsys.readouterr().out


def test_a_bundle_is_put_in_place_and_the_one_before_comes_back(shop: Shop) -> None:
    new = shop.folder / "new"
    first, second = newest_version(shop.served), newest_version(new)
    about = (new / "bundle.yaml").read_bytes()
    assert shop.run("use", str(new)) == 0
    assert load_bundle(shop.served).version == second
    assert shop.run("rollback") == 0
    back = load_bundle(shop.served)
    assert back.version > str(second)
    assert back.metrics == {"gap": 0.7}
    assert load_bundle(shop.folder / f"insight.{first}").version == first
    assert shop.run("rollback") == 0
    assert load_bundle(shop.served).metrics == {"gap": 0.8}
    # A bundle that is not later than the served one could not overwrite its tags.
    assert shop.run("use", str(new)) == 0
    assert load_bundle(shop.served).version > back.version
    assert (new / "bundle.yaml").read_bytes() == about


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["use", "none"], "none: holds no bundle (bundle.yaml is missing)"),
        (["use", "insight"], "is fusion.bundle, and is served already"),
        (["use", "foreign"], "modality text: takes features of theirs, not text-1"),
        (["shadow", "foreign"], "in the settings too, add --other-features"),
        (["use", "cut"], "model.safetensors: is truncated, or not this bundle's (sha256)"),
        (["use", "yaml"], "bundle.yaml: cannot be read"),
        (["use", "month13"], "begins with no time in UTC: 20261301T000000Z-"),
        (["show", "month13"], "begins with no time in UTC: 20261301T000000Z-"),
        (["use", "x" * 300], "File name too long"),
        (["shadow", "new", "--set", "fusion.shadow=loop"], "loop"),
        (["rollback"], "no bundle is kept next to"),
        (["rollback", "cut"], "model.safetensors: is truncated"),
        (["shadow"], "name a bundle, or --off"),
        (["shadow", "new", "--off"], "name a bundle, or --off"),
        (["show", "none"], "holds no bundle"),
        (["diff", "new", "none"], "holds no bundle"),
        (["list", "none"], "none: is not a folder"),
        (["compare", "new"], "name a data file with features by --data F"),
        (["compare", "new", "--data", "none.json"], "none.json"),
        (["compare", "new", "cut", "--data", "posts.json"], "is truncated"),
        (["compare", "a.jsonl", "b.jsonl"], "b.jsonl: no such data file"),
        (["compare", "a.jsonl"], "name two outputs (.jsonl), or bundles"),
        (["compare", "new", "a.jsonl"], "name two outputs (.jsonl), or bundles"),
        (["compare", "a.jsonl", "b.jsonl", "--data", "x"], "for bundles, not results"),
    ],
)
def test_wrong_uses_end_with_one_line(
    shop: Shop,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprints = {**support.FINGERPRINTS, "text": "theirs"}
    shop.write("foreign", NEW, manifest=support.manifest(fingerprints=fingerprints))
    for name in ("cut", "yaml"):
        shutil.copytree(shop.folder / "new", shop.folder / name)
    (shop.folder / "cut" / "model.safetensors").write_bytes(b"x")
    (shop.folder / "yaml" / "bundle.yaml").write_text("a: [", encoding="utf-8")
    shop.write("month13", "20261301T000000Z")
    (shop.folder / "loop").symlink_to("loop")
    before = newest_version(shop.served)
    monkeypatch.chdir(shop.folder)
    assert shop.run(*words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert newest_version(shop.served) == before


def test_a_bundle_for_other_settings_is_put_in_place_when_that_is_said(shop: Shop) -> None:
    fingerprints = {**support.FINGERPRINTS, "text": "theirs"}
    foreign = shop.write("foreign", NEW, manifest=support.manifest(fingerprints=fingerprints))
    assert shop.run("use", str(foreign), "--other-features") == 0
    assert newest_version(shop.served) == newest_version(foreign)


def test_differences_are_named(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    names = (*support.LABELS.names[1:], "new tag")
    thresholds = np.full(support.CLASSES, 0.5, np.float32)
    thresholds[0] = 0.25
    other = shop.write("other", NEW, labels=LabelMap(names), thresholds=thresholds)
    assert shop.run("diff", str(shop.served), str(other), "--json") == 0
    differences = printed(capsys)
    assert differences["labels"]["added"] == ["new tag"]
    assert differences["labels"]["removed"] == ["tag0"]
    assert differences["labels"]["renumbered"] == list(names[:-1])
    assert differences["thresholds"]["tag1"][1] == 0.25
    assert differences["features"] == {}
    assert differences["metrics"] == {"gap": [0.7, None]}
    assert differences["weights"] == "other"
    assert shop.run("diff", str(other)) == 0
    assert "+ tags added: tag0" in capsys.readouterr().out


def test_a_bundle_is_shown_with_its_tags(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.run("show", "--json") == 0
    shown = printed(capsys)
    assert (shown["state"], shown["tags"], shown["metrics"]) == ("served", 6, {"gap": 0.7})
    assert list(shown["thresholds"]) == list(support.LABELS.names)
    assert shown["features"]["text"]["fingerprint"] == "text-1"
    assert shop.run("show") == 0
    out = capsys.readouterr().out
    assert "served" in out
    assert "tag5" in out


def test_copies_of_bundles_are_kept_up_to_a_number(shop: Shop) -> None:
    """The latest stay, and with them the way back."""
    for number in range(MOST_KEPT + 3):
        assert shop.run("use", str(shop.folder / "new")) == 0, number
    copies = list(kept_bundles(shop.served))
    assert len(copies) == MOST_KEPT
    served = newest_version(shop.served)
    assert shop.run("rollback", str(copies[-1])) == 0
    assert newest_version(next(kept_bundles(shop.served))) == served


def test_a_trial_does_not_end_while_a_command_replaces_it(
    shop: Shop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shop.run("shadow", str(shop.folder / "new")) == 0
    monkeypatch.setattr(folder_module, "_LOCK_S", 0.0)
    trial = shop.folder / "insight.shadow"
    with replacing(trial):
        assert shop.run("shadow", "--off") == 2
    assert "another command has been replacing it" in capsys.readouterr().err
    assert trial.is_dir()


def test_a_trial_ends_without_a_trace(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in shop.folder.iterdir())
    assert shop.run("shadow", str(shop.folder / "new")) == 0
    assert (shop.folder / "insight.shadow" / "bundle.yaml").exists()
    assert shop.run("shadow", "--off") == 0
    assert sorted(path.name for path in shop.folder.iterdir()) == before
    capsys.readouterr()
    assert shop.run("shadow", "--off") == 0
    assert "no bundle on trial" in capsys.readouterr().out


def test_bundles_are_compared_on_labels(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    other = shop.write("other", NEW)  # of fresh weights
    data = support.write_posts(shop.folder / "data", "valid", 12, seed=3)
    assert shop.run("compare", str(shop.served), str(other), "--data", str(data), "--json") == 0
    figures = printed(capsys)
    assert figures["posts"] == figures["labelled"] == 12
    assert figures["scores"]["compared"] == 12 * support.CLASSES
    reader, records = FeatureFiles(None), support.records(data)
    for gap, folder in zip(figures["gap"], (shop.served, other), strict=True):
        inferer = Inferer.load(folder)
        posts = [reader.features(r.post_id, r.features, inferer.fingerprints) for r in records]
        truth = [[float(name in r.labels) for name in support.LABELS.names] for r in records]
        rows = zip(inferer.scores(posts).tolist(), truth, strict=True)
        assert gap == pytest.approx(support.plain_gap(rows))
    assert shop.run("compare", str(other), "--data", str(data)) == 0
    assert "GAP@20" in capsys.readouterr().out


def test_two_outputs_are_compared_by_tags(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    def line(post: str, **tags: float) -> str:
        named = [{"id": 0, "name": name, "score": score} for name, score in tags.items()]
        return json.dumps({"post_id": post, "tags": named, "labels": ["a"]})

    files = [shop.folder / name for name in ("one.jsonl", "two.jsonl")]
    files[0].write_text("\n".join([line("p", a=0.9, b=0.8), line("q", a=0.7), line("r")]))
    files[1].write_text("\n".join([line("q", a=0.5), line("p", a=0.6), line("s", b=1)]))
    assert shop.run("compare", *map(str, files), "--json") == 0
    figures = printed(capsys)
    assert (figures["posts"], figures["same_tags"]) == (2, 1)
    assert figures["scores"]["mean_abs_difference"] == pytest.approx(0.25)
    assert figures["differing_posts"] == [{"post_id": "p", "only_first": ["b"], "only_second": []}]
    assert figures["gap"][1] == 1.0


def test_what_is_copied_over_the_source_later_is_not_served(shop: Shop) -> None:
    new = shop.folder / "new"
    assert shop.run("use", str(new)) == 0
    (new / "model.safetensors").write_bytes(b"x")  # in place, as cp does
    assert load_bundle(shop.served).version == newest_version(new)


def test_commands_at_the_same_time_give_each_bundle_a_version_of_its_own(shop: Shop) -> None:
    """No change is lost either, and a part of a command that was killed is removed."""
    part = shop.folder / ".insight.0123abcd"
    part.mkdir()
    first = newest_version(shop.served)
    new, other = shop.folder / "new", shop.write("other", OLD)
    with ThreadPoolExecutor(4) as pool:
        puts = [pool.submit(put_bundle, each, shop.served, anew=True) for each in (new, other) * 4]
    versions = [put.result().version for put in puts]
    assert sorted(set(versions)) == sorted(versions)
    assert {put.result().before for put in puts} == {first, *sorted(versions)[:-1]}
    assert newest_version(shop.served) == max(versions)
    assert not part.exists()


def test_a_served_version_that_is_no_time_is_named(shop: Shop) -> None:
    about = shop.served / "bundle.yaml"
    about.write_text(about.read_text().replace("20260101T000000Z", "99991231T235959Z"))
    with pytest.raises(BundleError, match=r"99991231T235959Z-.*: no version is later than"):
        put_bundle(shop.folder / "new", shop.served, anew=False)


SMALL = {
    "video": {"frames": 4, "image_size": 32, "decode": "accurate"},
    "image": {"image_size": 32},
    "ocr": {"enabled": False},
}
SETTINGS = [
    *("--set", "features.ocr.enabled=false", "--set", "features.video.frames=4"),
    *("--set", "features.video.decode=accurate"),
] + [item for name in ("video", "image") for item in ("--set", f"features.{name}.image_size=32")]


def facts(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run(["inspect", *arguments, "--json", *SETTINGS]) == code
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streams, times and sound are shown; what is written is what the extractors get."""
    path = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(50), rotation=90, audio=media.tone(440, 2, 44100)
    )
    shown = facts(capsys, str(path), "--out", str(tmp_path / "seen"))
    assert (shown["type"], shown["read_as"], shown["notes"]) == ("MP4 video", "video", {})
    assert [stream["codec"] for stream in shown["streams"]] == ["h264", "aac"]
    assert shown["frames"]["times_s"] == pytest.approx([0.24, 0.72, 1.24, 1.72], abs=0.05)
    assert shown["turned"] == "transposed, left and right swapped"
    assert shown["sound"]["windows"] == 2
    decoded = decode_media("video", path, FeatureSettings.model_validate(SMALL), DecodeSettings())
    assert decoded.frames is not None
    for i, frame in enumerate(decoded.frames):
        with Image.open(tmp_path / "seen" / f"frame_{i:02}.png") as written:
            assert np.array_equal(np.asarray(written), frame)
    sound, rate_hz = soundfile.read(str(tmp_path / "seen" / "sound.wav"))
    assert (rate_hz, round(len(sound) / rate_hz)) == (16_000, 2)


def test_text_is_shown_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The extractor keeps the beginning: that is said, and the rest is seen."""
    picture = Image.new("RGB", (640, 160), "white")
    font = ImageFont.load_default(56)
    ImageDraw.Draw(picture).text((40, 40), "HELLO WORLD", "black", font)
    picture.save(tmp_path / "a.png")
    settings = ["--set", "features.image.image_size=32", "--set", "features.ocr.max_chars=5"]
    assert run(["inspect", str(tmp_path / "a.png"), "--json", *settings]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in shown["ocr"]] == ["HELLO WORLD"]
    assert shown["notes"] == {
        "ocr": "of 11 characters the extractor keeps the first 5 (features.ocr.max_chars)"
    }


def test_pictures_and_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = facts(capsys, str(media.write_animation(tmp_path / "a.gif", media.grey_steps(5))))
    assert (shown["read_as"], shown["image"]["shape"]) == ("image", [1, 32, 32, 3])
    shown = facts(capsys, str(tmp_path / "a.gif"), "--as", "video")
    assert len(shown["frames"]["times_s"]) == 4
    shown = facts(capsys, str(media.write_wav(tmp_path / "a.wav", media.tone(440, 3))))
    assert (shown["read_as"], shown["sound"]["seconds"]) == ("audio", 3.0)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note and 0 for a file that is used, the reason and 1 for a broken one, 2 for none."""
    path = media.write_wav(tmp_path / "a.wav", media.tone(440, 3))
    cut = media.truncate(path, tmp_path / "cut.wav", 0.95)
    assert facts(capsys, str(cut))["notes"]["audio"].endswith("which are used")
    cut = media.truncate(path, tmp_path / "cut.wav", 0.5)
    assert facts(capsys, str(cut), code=1)["error"].startswith("truncated WAV sound")
    assert run(["inspect", str(cut), *SETTINGS]) == 1
    assert "failed    truncated WAV sound" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "none.mp4"), *SETTINGS]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["http://", "https://", "//"])
def test_a_password_of_a_url_is_not_shown(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", f"{scheme}u:secret1@127.0.0.1:9/a.jpg", *SETTINGS]) == 2
    said = capsys.readouterr().err
    assert f"{scheme}u:***@127.0.0.1" in said
    assert "secret1" not in said
